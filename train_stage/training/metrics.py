"""The numbers of a log line, over all processes."""

import time
from typing import Any

import torch

from train_stage.objective.sums import Sums, describe_sums
from train_stage.training.clock import Clock
from train_stage.training.run import Run


def collect_metrics(run: Run, clock: Clock, grad_norm: torch.Tensor) -> dict[str, Any]:
    """Metrics since the last log line, over all processes; a collective call and a sync point.

    Raises FloatingPointError when the loss is no number any more.
    """
    metrics: dict[str, Any] = describe_sums(all_sums(run).tolist())
    seconds = time.perf_counter() - clock.started
    metrics |= {
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "grad_norm": float(grad_norm),
        "images_per_s": clock.images / seconds,
        "data_wait": clock.waited / seconds,
        "epoch": run.loader.epoch(run.step),
    }
    if run.ema is not None:
        metrics["ema_decay"] = run.ema.last_decay
    run.sums = Sums.zeros(run.accelerator.device)
    clock.restart()
    return metrics


def all_sums(run: Run) -> torch.Tensor:
    """The sums of all processes as one vector. Raises FloatingPointError for NaN or infinity."""
    flat = run.accelerator.reduce(run.sums.flat(), reduction="sum")
    if not flat.isfinite().all():
        raise FloatingPointError(
            f"the loss is not finite at step {run.step}: nothing was saved since the last "
            "checkpoint; lower optimizer.params.learning_rate or training.max_grad_norm"
        )
    return flat
