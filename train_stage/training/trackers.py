"""wandb and TensorBoard, and what a run says of itself when it starts.

A run that goes on keeps its id in wandb and its folder (RUN/tensorboard), where steps that are
done again take the place of those before.
"""

import json
import time
import uuid
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image

from configs.load import ConfigError, dump_config
from storage.atomic import atomic_file
from train_stage.config import TrainConfig
from train_stage.reporting.history import STARTS
from train_stage.training.metrics import StepWork, codes_an_image
from train_stage.training.run import Run
from train_stage.training.run_log import say


def check_trackers(config: TrainConfig) -> None:
    """Raises ConfigError for a tracker that is asked for and not installed."""
    if config.wandb.mode != "disabled" and find_spec("wandb") is None:
        raise ConfigError(
            f"wandb.mode={config.wandb.mode}, but wandb is missing: pip install wandb"
        )
    if config.experiment.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("experiment.tensorboard=true, but it is missing: pip install tensorboard")


def start_trackers(run: Run) -> None:
    """Opens those that are asked for, on the main process."""
    accelerator, experiment = run.accelerator, run.config.experiment
    if not accelerator.is_main_process:
        return
    trackers: list[Any] = []
    if run.config.wandb.mode != "disabled":
        trackers.append(WandBTracker(experiment.project, **wandb_options(run)))
    if experiment.tensorboard:
        trackers.append(TensorBoardTracker("tensorboard", run.path, purge_step=run.step + 1))
    accelerator.log_with = trackers
    accelerator.init_trackers(experiment.project)
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.store_init_configuration(asdict(run.config))
        else:  # as text: TensorBoard's own table would be another run for every start
            tracker.writer.add_text("config", f"```yaml\n{dump_config(run.config)}```", run.step)


def wandb_options(run: Run) -> dict[str, Any]:
    """wandb.init's keywords; the id is the run directory's for ever."""
    id_file = run.path / "wandb_id"
    if not id_file.is_file():
        with atomic_file(id_file) as temporary:
            temporary.write_text(uuid.uuid4().hex[:12])
    return {
        "id": id_file.read_text(),
        "resume": "allow",
        "name": run.config.experiment.name or run.path.name,
        "entity": run.config.wandb.entity,
        "mode": run.config.wandb.mode,
        "dir": str(run.path),
    }


def track_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """A PNG to every tracker."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pixels}, step, **options)


def describe_run(run: Run, work: StepWork) -> None:
    """Says what is about to happen, on the console and as a line of RUN/starts.jsonl."""
    loader, accelerator = run.loader, run.accelerator
    about = {
        "step": run.step,
        "time": round(time.time(), 1),
        "max_train_steps": run.config.training.max_train_steps,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "outputs": run.model.output_size,
        "tokens": codes_an_image(run),
        "rows": loader.rows,
        "global_batch_size": loader.global_batch_size,
        "processes": accelerator.num_processes,
        "device": device_name(accelerator.device),
        "precision": accelerator.mixed_precision,
        "tflop_a_step": work.tflop * accelerator.num_processes,
        "mfu_of": f"{work.by.tflops:.4g} TFLOP/s, {work.by.source}",
    }
    if accelerator.is_main_process:
        with open(run.path / STARTS, "a") as file:
            file.write(json.dumps(about) + "\n")
    say(
        accelerator,
        f"{about['parameters'] / 1e6:.2f} M parameters, {loader.rows:,} rows, global batch "
        f"{loader.global_batch_size} = {accelerator.num_processes} processes x {run.passes} "
        f"passes, {about['device']}, {accelerator.mixed_precision} mixed precision; "
        f"{about['tflop_a_step']:.3g} TFLOP a step, MFU of {about['mfu_of']}; writes to {run.path}",
    )


def device_name(device: torch.device) -> str:
    """What a GPU calls itself, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
