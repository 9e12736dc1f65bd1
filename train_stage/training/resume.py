"""Going on from a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from configs.load import changed_keys, dump_config
from storage.pretrained import check_fits, read_weights
from train_stage.objective.sums import Sums
from train_stage.training.agreement import decide, largest
from train_stage.training.checkpoint import (
    AVERAGED,
    SHARDS,
    UNWRAPPED,
    choose_checkpoint,
    read_metadata,
)
from train_stage.training.parallel import load_full_tensors, load_optimizer_state
from train_stage.training.run import Run
from train_stage.training.run_log import say
from train_stage.training.sharded_checkpoint import load_shards


def find_start(run: Path, wanted: str | None) -> Path | None:
    """choose_checkpoint by the main process for all; a collective call."""
    chosen = decide(lambda: choose_checkpoint(run, wanted))
    if chosen is not None and largest(not chosen.is_dir()):
        raise ValueError(
            f"{chosen} is not there on all nodes: experiment.output_dir={run} must be a folder "
            "that they share"
        )
    return chosen


def resume(run: Run, checkpoint: Path) -> None:
    """Goes to where a checkpoint was written; says which options have changed since.

    Raises ValueError for weights, data or an optimizer that do not fit, or a missing EMA.
    """
    metadata, before = read_metadata(checkpoint), OmegaConf.load(checkpoint / "config.yaml")
    assert isinstance(before, DictConfig)
    run.step = metadata["global_step"]
    say(run.accelerator, f"going on from {checkpoint} (step {run.step})")
    for key, old, new in changed_keys(before, OmegaConf.create(dump_config(run.config))):
        say(run.accelerator, f"  changed: {key} was {old}, is now {new}")
    run.loader.load_state_dict(metadata["loader"], run.config.dataset.accept_changes)
    state = torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True)
    if run.ema is not None and state.get("ema") is None:
        raise ValueError(f"{checkpoint} has no EMA: set training.use_ema=false or start a new run")
    if run.accelerator.is_main_process:  # the sums of all processes are kept by the first
        run.sums = Sums.from_flat(state["sums"].to(run.accelerator.device))
    experiment, is_same_run = run.config.experiment, checkpoint.parent.samefile(run.path)
    is_other = kind_of(before.optimizer.name) != kind_of(run.config.optimizer.name)
    is_anew = experiment.dont_resume_optimizer and (
        is_other or not (is_same_run and before.experiment.get("dont_resume_optimizer"))
    )
    if is_anew:
        say(run.accelerator, "  the optimizer starts anew")
    elif is_other:
        raise ValueError(
            f"{checkpoint} has the state of {before.optimizer.name}, which "
            f"{run.config.optimizer.name} cannot go on from: give optimizer.name="
            f"{before.optimizer.name}, or experiment.dont_resume_optimizer=true to start it anew"
        )
    load_tensors(run, checkpoint, None if is_anew else state["optimizer"])
    if run.ema is not None:
        run.ema.optimization_step = state["ema"]["optimization_step"]
        run.ema.last_decay = state["ema"]["last_decay"]
    if state["scaler"] is not None and run.accelerator.scaler is not None and not is_anew:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.schedule_start = state.get("schedule_start", 0)
    if not experiment.resume_lr_scheduler and not (
        is_same_run and not before.experiment.get("resume_lr_scheduler", True)
    ):
        say(run.accelerator, f"  the learning rate's schedule starts anew at step {run.step}")
        run.schedule_start = run.step


def kind_of(optimizer: str) -> str:
    """The same for names of optimizers that keep the same state."""
    return optimizer.removeprefix("fused_")


def load_tensors(run: Run, checkpoint: Path, optimizer: dict[str, Any] | None) -> None:
    """Weights, averaged weights where the run has them, and the optimizer's state if given."""
    if (checkpoint / SHARDS).is_dir():
        load_shards(run, checkpoint / SHARDS, optimizer)
        return
    weights = read_weights(checkpoint / UNWRAPPED)
    check_fits(run.model, weights, str(checkpoint))
    load_full_tensors(run.model.state_dict(), weights)
    if run.ema is not None:
        load_full_tensors(run.ema.shadow, read_weights(checkpoint / AVERAGED))
    if optimizer is not None:
        load_optimizer_state(run, optimizer)
