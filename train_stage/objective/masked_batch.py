"""One optimizer step's masked batch and its loss, the same for any number of processes.

Masks and dropped conditions are drawn for the whole global batch from (seed, step), then sliced;
the loss is a sum over this process's codes divided by the count over all. Nothing but (seed,
step) decides what is random, so a resumed run needs no generator state. Draws are made on the
host: the same on every device, and what is scored is known without waiting for a GPU. (Dropout
depends on device and process.)
"""

import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from train_stage.config import TrainingConfig
from train_stage.loading.loader import Batch
from train_stage.loading.order import hash_words
from train_stage.models.transformer import MaskGitTransformer
from train_stage.objective.loss import BUCKETS, IGNORE, bucket_of
from train_stage.objective.mask_schedule import Schedule
from train_stage.objective.masking import apply_mask, class_tokens, draw_mask, prepend_token

MASKS, DROPOUT = 1, 2  # names of the random streams of a step


@dataclass
class MaskedBatch:
    """This process's part of a step's batch, b rows of T tokens."""

    input_ids: Tensor  # (b, T)
    labels: Tensor  # (b, T)
    is_scored: Tensor  # (b, T) bool, on the host: where labels are not -100
    scored: int  # codes in the global batch

    def split(self, passes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """input_ids, labels and positions (see MaskedLoss) of each forward pass."""
        parts = (values.chunk(passes) for values in (self.input_ids, self.labels, self.is_scored))
        for input_ids, labels, is_scored in zip(*parts, strict=True):
            positions = is_scored.flatten().nonzero().squeeze(-1)
            yield input_ids, labels, send(positions, input_ids.device)


def send(values: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it: through pinned memory where it is a GPU."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def mask_batch(
    batch: Batch,
    model: MaskGitTransformer,
    config: TrainingConfig,
    schedule: Schedule,
    rank: int,
    world_size: int,
    device: torch.device,
) -> MaskedBatch:
    """Hides codes of a batch and adds the class token, dropped with cond_dropout_prob."""
    share, length = batch.codes.shape
    rows = share * world_size
    generator = torch.Generator().manual_seed(stream_seed(config.seed, batch.step, MASKS))
    draw = draw_mask(
        rows,
        length,
        schedule,
        generator,
        config.min_masking_rate,
        config.mask_contiguous_region_prob,
        rng=random.Random(generator.initial_seed()),
    )
    dropped = torch.rand(rows, generator=generator) < config.cond_dropout_prob
    mine = slice(rank * share, (rank + 1) * share)
    codes = send(batch.codes, device).long()  # they may travel as uint16
    is_scored = draw.mask[mine]
    input_ids, labels = apply_mask(codes, send(is_scored, device), model.mask_token_id)
    if model.config.num_classes:
        class_ids = send(batch.class_ids, device)
        size, mask_id = model.config.codebook_size, model.mask_token_id
        token = class_tokens(class_ids, send(dropped[mine], device), size, mask_id)
        input_ids, labels = prepend_token(input_ids, labels, token)
        is_scored = F.pad(is_scored, (1, 0))
    return MaskedBatch(input_ids, labels, is_scored, int(draw.mask.sum()))


def backward(
    loss_module: nn.Module, batch: MaskedBatch, passes: int, accelerator: Accelerator
) -> "Sums":
    """Forward and backward of this process's batch in `passes` parts; returns its loss sums.

    DistributedDataParallel averages gradients over processes, hence the factor num_processes.
    """
    sums = Sums.zeros(batch.input_ids.device)
    scale = accelerator.num_processes / batch.scored
    for index, (input_ids, labels, positions) in enumerate(batch.split(passes)):
        more_to_come = index < passes - 1
        with accelerator.no_sync(loss_module) if more_to_come else nullcontext():
            out = loss_module(input_ids, labels, positions)
            accelerator.backward(out["total"] * scale)
        sums.add(out, labels)
    return sums


@dataclass
class Sums:
    """Running sums for the log, kept on the device until a log line needs them."""

    loss: Tensor  # () what is minimised (smoothed)
    plain: Tensor  # () cross-entropy in nats
    correct: Tensor  # ()
    bucket_loss: Tensor  # (10,) cross-entropy by share of masked codes
    bucket_count: Tensor  # (10,)

    @classmethod
    def zeros(cls, device: torch.device) -> "Sums":
        zero = torch.zeros((), dtype=torch.float64, device=device)
        tens = torch.zeros(BUCKETS, dtype=torch.float64, device=device)
        return cls(zero, zero.clone(), zero.clone(), tens, tens.clone())

    def add(self, out: dict[str, Tensor], labels: Tensor) -> None:
        """Adds one forward pass: MaskedLoss's output and the labels (b, T) it scored."""
        count = (labels != IGNORE).sum(-1)  # (b,)
        plain = out["plain"].double()  # (M,)
        bucket = bucket_of(count / labels.shape[-1])
        bucket = bucket.repeat_interleave(count, output_size=len(plain))  # (M,)
        self.loss += out["losses"].sum()
        self.plain += plain.sum()
        self.correct += out["correct"].sum()
        self.bucket_loss.index_add_(0, bucket, plain)
        self.bucket_count.index_add_(0, bucket, torch.ones_like(plain))

    def merge(self, other: "Sums") -> None:
        """Adds another's sums."""
        for name, value in vars(other).items():
            getattr(self, name).add_(value)

    @classmethod
    def from_flat(cls, flat: Tensor) -> "Sums":
        """flat() backwards."""
        parts = flat.split([1, 1, 1, BUCKETS, BUCKETS])
        return cls(*(part.squeeze() if len(part) == 1 else part for part in parts))

    def flat(self) -> Tensor:
        """All sums as one vector, for one all-reduce and one copy to the host."""
        return torch.cat([value.reshape(-1) for value in vars(self).values()])


def describe_sums(flat: list[float]) -> dict[str, float]:
    """Metrics from Sums.flat(), summed over processes: loss, accuracy, loss by bucket (nats)."""
    loss, plain, correct = flat[:3]
    bucket_loss, bucket_count = flat[3 : 3 + BUCKETS], flat[3 + BUCKETS :]
    count = max(1.0, sum(bucket_count))
    metrics = {"loss": loss / count, "cross_entropy": plain / count, "accuracy": correct / count}
    for index, (total, number) in enumerate(zip(bucket_loss, bucket_count, strict=True)):
        if number:
            metrics[f"loss_masked_{10 * index}_{10 * (index + 1)}"] = total / number
    return metrics


def stream_seed(seed: int, step: int, *stream: int) -> int:
    """The seed of one random stream of one step."""
    return int(hash_words(seed, step, *stream)) >> 1  # 63 bits, as torch takes
