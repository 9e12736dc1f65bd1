"""The numbers of a log line, over all processes.

The loss and its parts come from objective/sums.py. Here: what the optimizer did, how fast it went
(`mfu`: operations of the model's forward pass and twice as many of its backward pass, recomputed
ones left out, over what the machine could have done meanwhile) and what it took.
"""

import resource
import sys
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from train_stage.models.sizes import condition_shapes
from train_stage.models.token_transformer import TokenTransformer
from train_stage.objective.sums import Sums, describe_sums
from train_stage.training.clock import Clock
from train_stage.training.dry_run import expected_masked
from train_stage.training.peak_speed import Yardstick, yardstick
from train_stage.training.run import Run


class StepWork(NamedTuple):
    """What a step costs a process, and what its speed is measured by."""

    tflop: float
    by: Yardstick


def step_work(run: Run) -> StepWork:
    """Counts a step's operations: three times those of its forward passes.

    A frozen text encoder, the optimizer and critics are left out.
    """
    training, accelerator = run.config.training, run.accelerator
    codes = codes_an_image(run)
    hidden = expected_masked(run.schedule, codes, training.min_masking_rate)
    flops = forward_flops(run.model, codes, codes if training.predicts_all else hidden)
    passes = 3 + training.self_conditioning_prob * run.model.config.self_conditioning
    rows = run.loader.global_batch_size // accelerator.num_processes
    by = yardstick(accelerator.device, training.mixed_precision, training.enable_tf32)
    return StepWork(passes * flops * rows / 1e12, by)


@torch.no_grad()
def forward_flops(model: TokenTransformer, codes: int, scored: float) -> float:
    """Operations of a row's forward pass with logits of `scored` of its codes.

    Taken by a copy without data in a fraction of a second.
    """
    with torch.device("meta"):
        model = type(model).from_config(model.config_dict())
        condition = {
            name: torch.empty(1, *shape) for name, shape in condition_shapes(model).items()
        }
        length = codes + bool(getattr(model.config, "num_classes", None))  # U-ViT: no class token
        input_ids = torch.empty(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(input_ids, **condition)  # (1, T, E)
        trunk = counter.get_total_flops()
        model.logits(hidden[0, :1])
    return trunk + scored * (counter.get_total_flops() - trunk)


def codes_an_image(run: Run) -> int:
    """N, of the tokenizer's grid."""
    height, width = run.codes["tokenizer"]["grid"]
    return height * width


def collect_metrics(
    run: Run, clock: Clock, grad_norm: torch.Tensor, work: StepWork | None = None
) -> dict[str, Any]:
    """Metrics since the last log line, over all processes; a collective call and a sync point.

    Raises FloatingPointError when the loss is no number any more.
    """
    metrics: dict[str, Any] = describe_sums(all_sums(run).tolist())
    seconds = clock.seconds()
    images_per_s = clock.images / seconds
    stall, memory = worst(run, clock.stalled() / seconds, peak_memory_gb(run.accelerator.device))
    metrics |= {
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "grad_norm": float(grad_norm),
        "images_per_s": images_per_s,
        "tokens_per_s": images_per_s * codes_an_image(run),
        "data_wait": stall,
        "peak_memory_gb": memory,
        "epoch": run.loader.epoch(run.step),
    }
    if work is not None:
        steps_per_s = images_per_s / run.loader.global_batch_size
        metrics["mfu"] = work.tflop * steps_per_s / work.by.tflops
    if run.skipped:
        metrics["skipped_steps"] = run.skipped
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


def worst(run: Run, *values: float) -> list[float]:
    """Each value's largest over the processes: the slowest is the one that all wait for."""
    mine = torch.tensor([values], device=run.accelerator.device)
    return run.accelerator.gather(mine).amax(0).tolist()


def peak_memory_gb(device: torch.device) -> float:
    """The most since the start: tensors of a GPU, or what this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
