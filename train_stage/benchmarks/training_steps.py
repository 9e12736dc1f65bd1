"""Training steps as train_stage.bench times them: ours, and the reference's on the same batches."""

import importlib
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.reader import TokenStore
from train_stage.benchmarks.bench_loader import write_store
from train_stage.benchmarks.measure import CLASSES, CODEBOOK, CODES
from train_stage.benchmarks.timing import Way, synchronize
from train_stage.loading.loader import Batch, TokenLoader
from train_stage.models.sizes import condition_shapes
from train_stage.models.token_transformer import TokenTransformer
from train_stage.objective.config import ObjectiveFields
from train_stage.objective.loss import MaskedLoss
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.objective.masked_batch import MaskedBatch, mask_batch
from train_stage.training.clock import Clock
from train_stage.training.optimizer import make_optimizer

ROWS = 4096
Batches = Callable[[int], Batch]  # of a step's number


def our_step(
    model: TokenTransformer,
    batches: Batches,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    clock: Clock | None = None,
) -> Way:
    """muse-train's step; every call takes the next one, and gives its loss.

    batches: of a store, or of whatever makes codes; compiled: the repeated blocks.
    """
    loss_module = MaskedLoss(model.train())
    if compiled:
        loss_module.compile_parts()

    def loss(masked: MaskedBatch) -> Tensor:
        (part,) = masked.split(1)
        return loss_module(**part)["total"] / masked.denominator

    optimizer = make_optimizer(model, "adamw", 1e-4, (0.9, 0.999), 0.01, 1e-8)
    masked = masked_batches(model, batches, device, clock or Clock(device))
    return step_of(loss, optimizer, masked, device, dtype)


def reference_step(
    theirs: Any,
    ours: TokenTransformer,
    batches: Batches,
    device: torch.device,
    dtype: torch.dtype,
    recomputes: bool,
) -> Way:
    """The reference's model, loss and optimizer on the same masked batches as our model's.

    recomputes: activations, as its imagenet.yaml says. Generous: without its encoding and its
    gathers for the log, and with fused AdamW on a GPU, where it has apex's.
    """
    theirs.train()
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.01, fused=fused)
    masked = masked_batches(ours, batches, device, Clock(device))

    def loss(batch: MaskedBatch) -> Tensor:
        theirs.gradient_checkpointing = recomputes
        return theirs(input_ids=batch.input_ids, labels=batch.labels)[1]

    return step_of(loss, optimizer, masked, device, dtype)


def masked_batches(
    model: TokenTransformer, batches: Batches, device: torch.device, clock: Clock
) -> Callable[[], MaskedBatch]:
    """The masked batch of the next step, whenever it is called; random conditions."""
    schedule, objective, numbers = get_mask_schedule("cosine"), ObjectiveFields(), count()
    shapes = condition_shapes(model).items()

    def condition(batch: Batch, dropped: Tensor) -> dict[str, Tensor]:
        return {name: torch.randn(len(dropped), *shape, device=device) for name, shape in shapes}

    def next_batch() -> MaskedBatch:
        with clock.waiting():
            batch = batches(next(numbers))
        return mask_batch(batch, model, objective, 0, schedule, 0, 1, device, condition)

    return next_batch


def step_of(
    loss: Callable[[MaskedBatch], Tensor],
    optimizer: torch.optim.Optimizer,
    masked: Callable[[], MaskedBatch],
    device: torch.device,
    dtype: torch.dtype,
) -> Way:
    """Forward, backward and update; a call gives the loss, a mean over scored codes."""

    def step() -> Tensor:
        batch = masked()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def share_of_waiting(way: Way, clock: Clock, device: torch.device, rounds: int) -> float:
    """Of the time of some steps, how much nothing was computed for want of data."""
    synchronize(device)
    clock.restart()
    for _ in range(rounds):
        way()
    synchronize(device)
    return clock.stalled() / clock.seconds()


def random_loader(folder: Path, batch: int) -> TokenLoader:
    """Over a store of random codes and classes, as it is made: zarr, in memory."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, CODEBOOK, (ROWS, CODES), dtype=np.uint16)
    write_store(folder / "store", codes, generator.integers(0, CLASSES, ROWS), "zarr")
    return TokenLoader(TokenStore(folder / "store"), batch, narrow=True)


def import_reference(folder: Path) -> ModuleType:
    """muse.modeling_transformer of a checkout, without the rest of its package.

    Raises FileNotFoundError without it, ModuleNotFoundError for what it needs (einops).
    """
    if not (folder / "muse" / "modeling_transformer.py").is_file():
        raise FileNotFoundError(
            f"{folder} has no muse/modeling_transformer.py: git clone "
            "https://github.com/huggingface/open-muse, and give that folder"
        )
    package = ModuleType("muse")
    package.__path__, package.__version__ = [str(folder / "muse")], "0"  # type: ignore[attr-defined]
    sys.modules["muse"] = package
    sys.modules.pop("muse.modeling_transformer", None)  # of another checkout
    return importlib.import_module("muse.modeling_transformer")
