"""wandb, and what a run says of itself when it starts."""

import uuid
from dataclasses import asdict

from train_stage.training.run import Run
from train_stage.training.run_log import say


def start_trackers(run: Run) -> None:
    """Opens wandb when asked for; a run that goes on keeps its id there."""
    config, accelerator = run.config, run.accelerator
    if config.wandb.mode == "disabled" or not accelerator.is_main_process:
        return
    id_file = run.path / "wandb_id"
    if not id_file.is_file():
        id_file.write_text(uuid.uuid4().hex[:12])
    options = {
        "id": id_file.read_text(),
        "resume": "allow",
        "name": config.experiment.name or run.path.name,
        "entity": config.wandb.entity,
        "mode": config.wandb.mode,
        "dir": str(run.path),
    }
    accelerator.init_trackers(config.experiment.project, asdict(config), {"wandb": options})


def describe_run(run: Run) -> None:
    """Says what is about to happen."""
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    loader, accelerator = run.loader, run.accelerator
    say(
        accelerator,
        f"{parameters / 1e6:.2f} M parameters, {loader.rows:,} rows, global batch "
        f"{loader.global_batch_size} = {accelerator.num_processes} processes x {run.passes} "
        f"passes, {accelerator.device}, {accelerator.mixed_precision} mixed precision; "
        f"writes to {run.path}",
    )
