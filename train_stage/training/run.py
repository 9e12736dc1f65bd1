"""Run: everything of a training run that lives from step to step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from train_stage.config import TrainConfig
from train_stage.loading.loader import Batch, TokenLoader
from train_stage.models.token_transformer import TokenTransformer
from train_stage.objective.mask_schedule import Schedule
from train_stage.objective.masked_batch import Conditioner, MaskedBatch, mask_batch
from train_stage.objective.sums import Sums
from train_stage.training.ema import EMA
from train_stage.training.samples import SampleWriter


@dataclass
class Run:
    """Everything of a training run that lives from step to step."""

    config: TrainConfig
    path: Path
    accelerator: Accelerator
    loader: TokenLoader
    eval_loader: TokenLoader | None
    model: TokenTransformer
    loss_module: nn.Module  # MaskedLoss over the model, as accelerate wrapped it
    optimizer: Optimizer  # as accelerate wrapped it
    learning_rate: float  # at the peak of the schedule
    ema: EMA | None
    schedule: Schedule
    passes: int  # forward passes per step and process
    samples: SampleWriter | None
    conditioner: Conditioner | None  # of text; class tokens need none
    codes: dict[str, Any]  # what codes.json beside the weights says
    sums: Sums  # since the last log line
    step: int = 0
    skipped: int = 0  # steps since the start that fp16 had no finite gradient for
    schedule_start: int = 0  # the step from which the learning rate's schedule counts


def make_masked(run: Run, batch: Batch) -> MaskedBatch:
    """mask_batch for this process of this run."""
    accelerator = run.accelerator
    return mask_batch(
        batch,
        run.model,
        run.config.training,
        run.config.training.seed,
        run.schedule,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        run.conditioner,
        tuple(run.codes["tokenizer"]["grid"]),
    )


def due(run: Run, every: int) -> bool:
    """True at steps that are a multiple of `every`; never for 0."""
    return bool(every) and run.step % every == 0
