"""Going on from a checkpoint."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from configs.load import changed_keys, dump_config
from train_stage.objective.sums import Sums
from train_stage.training.checkpoint import load_checkpoint
from train_stage.training.run import Run
from train_stage.training.run_log import say


def resume(run: Run, checkpoint: Path) -> None:
    """Goes to where a checkpoint was written; says which options have changed since."""
    accelerator = run.accelerator
    state = load_checkpoint(checkpoint, run.model, run.ema)
    run.loader.load_state_dict(state["loader"], run.config.dataset.accept_changes)
    run.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if accelerator.is_main_process:  # the sums of all processes are kept by the first
        run.sums = Sums.from_flat(state["sums"].to(accelerator.device))
    run.step = state["global_step"]
    say(accelerator, f"going on from {checkpoint} (step {run.step})")
    before = OmegaConf.load(checkpoint / "config.yaml")
    for key, old, new in changed_keys(before, OmegaConf.create(dump_config(run.config))):
        say(accelerator, f"  changed: {key} was {old}, is now {new}")


def same_step_everywhere(run: Run) -> None:
    """Refuses processes that found different checkpoints."""
    steps = run.accelerator.gather(torch.tensor([run.step], device=run.accelerator.device))
    if len(set(steps.tolist())) > 1:
        raise ValueError(
            f"the processes would start from steps {sorted(set(steps.tolist()))}: "
            f"experiment.output_dir={run.path} must be a folder that all nodes share"
        )
