"""Step 6: the masked batch of one optimizer step, the same for any number of processes.

Everything random is drawn for the whole global batch from (seed, step), then sliced: a resumed run
needs no generator state. Draws are made on the host: the same on every device, and what is scored
is known without waiting for a GPU. (Dropout depends on device and process.)
b rows of this process, N codes and T tokens a row, M scored codes of this process.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train_stage.loading.loader import Batch
from train_stage.loading.order import hash_words
from train_stage.models.token_transformer import TokenTransformer
from train_stage.objective.buckets import code_buckets
from train_stage.objective.config import ObjectiveFields
from train_stage.objective.mask_schedule import Schedule
from train_stage.objective.masking import (
    MaskDraw,
    apply_mask,
    class_tokens,
    draw_mask,
    predict_all_weights,
    prepend_token,
)
from train_stage.objective.soft_targets import drawn_targets, stored_targets

# names of the random streams of a step
MASKS, DROPOUT, NOISE, SAMPLES, COIN, CODES = 1, 2, 3, 4, 5, 6
Conditioner = Callable[[Batch, Tensor], dict[str, Tensor]]  # dropped rows (b,) -> model's keywords


@dataclass
class MaskedBatch:
    """This process's part of a step's batch."""

    input_ids: Tensor  # (b, T)
    labels: Tensor  # (b, T)
    is_scored: Tensor  # (b, T) bool, on the host: where labels are not -100
    denominator: float  # codes scored in the global batch, or the sum of their weights
    by_row: dict[str, Tensor]  # further keywords of MaskedLoss: (b, …), on the device
    by_code: dict[str, Tensor]  # (M, …), on the host
    wants_entropy: bool = False

    def split(self, passes: int) -> Iterator[dict[str, Tensor]]:
        """The keywords of MaskedLoss for each forward pass."""
        device, is_scored = self.input_ids.device, self.is_scored.chunk(passes)
        counts = [int(part.sum()) for part in is_scored]
        by_row = {"input_ids": self.input_ids, "labels": self.labels, **self.by_row}
        rows = {name: values.chunk(passes) for name, values in by_row.items()}
        codes = {name: values.split(counts) for name, values in self.by_code.items()}
        codes["positions"] = tuple(part.flatten().nonzero().squeeze(-1) for part in is_scored)
        if self.wants_entropy:
            length = self.labels.shape[1]
            codes["image"] = tuple(part // length for part in codes["positions"])
        for index in range(passes):
            yield {name: parts[index] for name, parts in rows.items()} | {
                name: send(parts[index], device) for name, parts in codes.items()
            }


def send(values: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it: through pinned memory where it is a GPU."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def mask_batch(
    batch: Batch,
    model: TokenTransformer,
    config: ObjectiveFields,
    seed: int,
    schedule: Schedule,
    rank: int,
    world_size: int,
    device: torch.device,
    conditioner: Conditioner | None = None,
    grid: tuple[int, int] | None = None,
) -> MaskedBatch:
    """Hides codes of a batch, adds the condition, dropped with cond_dropout_prob.

    conditioner: the model's keywords for text; the class token is made here. grid (h, w) of the
    codes, for rectangles.
    """
    share, length = batch.codes.shape
    rows, mine = share * world_size, slice(rank * share, (rank + 1) * share)

    def uniform(name: int) -> Tensor:  # (b, N) in [0, 1), drawn for the global batch
        return torch.rand(rows, length, generator=stream(seed, batch.step, name))[mine]

    draw, dropped = draw_rows(rows, length, config, schedule, grid, seed, batch.step, mine)
    hidden, dropped = draw.mask[mine], dropped[mine]  # (b, N), (b,)
    weight = predict_all_weights(draw) if config.predicts_all else draw.mask.float()
    is_scored, denominator = weight[mine] > 0, weight.sum(dtype=torch.float64).item()
    size, mask_id = model.config.codebook_size, model.mask_token_id
    stochastic = config.use_stochastic_code
    codes = drawn_targets(batch.columns, uniform(CODES)) if stochastic else batch.codes
    codes = send(codes, device).long()  # they may travel as uint16
    input_ids, labels = apply_mask(codes, send(hidden, device), mask_id)
    labels = codes if config.predicts_all else labels
    if config.noise_type == "random_replace":
        noise = send(uniform(NOISE), device).mul(size).long()
        input_ids = torch.where(input_ids == mask_id, noise, codes)
    by_code = keywords_by_code(batch, hidden, weight[mine], config)
    by_row = {} if conditioner is None else conditioner(batch, dropped)
    if config.critic:
        denominator = float(rows * length) if config.critic == "token" else denominator
        each = config.critic_weight * denominator / (rows * length)
        by_row |= {"codes": codes, "critic_weight": torch.full((share,), each, device=device)}
        by_code["draw"] = uniform(SAMPLES)[is_scored]
    if getattr(model.config, "num_classes", None):  # a U-ViT knows none
        token = class_tokens(send(batch.class_ids, device), send(dropped, device), size, mask_id)
        input_ids, labels = prepend_token(input_ids, labels, token)
        is_scored = F.pad(is_scored, (1, 0))
    if predicts_first(model, config, seed, batch.step):
        by_row["previous"] = torch.full_like(input_ids, mask_id)
    due = config.log_entropy_every and batch.step % config.log_entropy_every == 0
    return MaskedBatch(input_ids, labels, is_scored, denominator, by_row, by_code, bool(due))


def draw_rows(
    rows: int,
    length: int,
    config: ObjectiveFields,
    schedule: Schedule,
    grid: tuple[int, int] | None,
    seed: int,
    step: int,
    needed: slice,
) -> tuple[MaskDraw, Tensor]:
    """Masks of the global batch (see draw_mask), and which rows lose their condition: (B,) bool."""
    generator = stream(seed, step, MASKS)
    draw = draw_mask(
        rows,
        length,
        schedule,
        generator,
        config.min_masking_rate,
        config.mask_contiguous_region_prob,
        rng=random.Random(generator.initial_seed()),
        grid=grid,
        stratified=config.stratified_mask_ratios,
        needed=needed,
    )
    return draw, torch.rand(rows, generator=generator) < config.cond_dropout_prob


def keywords_by_code(
    batch: Batch, hidden: Tensor, weight: Tensor, config: ObjectiveFields
) -> dict[str, Tensor]:
    """What MaskedLoss is told of the scored codes, (M, …) each; hidden and weight: (b, N)."""
    is_scored = weight > 0
    found = {"bucket": code_buckets(hidden)[is_scored]}
    if config.predicts_all:
        found["weight"] = weight[is_scored]
    if config.soft_targets == "stored":
        found |= stored_targets(batch.columns, is_scored)
    return found


def predicts_first(model: TokenTransformer, config: ObjectiveFields, seed: int, step: int) -> bool:
    """Whether this step conditions the model on its own prediction: a coin, for all processes."""
    if not model.config.self_conditioning or config.critic == "token":
        return False
    coin = torch.rand((), generator=stream(seed, step, COIN))
    return bool(coin < config.self_conditioning_prob)


def stream(seed: int, step: int, *names: int) -> torch.Generator:
    """A generator on the host for one random stream of one step."""
    return torch.Generator().manual_seed(stream_seed(seed, step, *names))


def stream_seed(seed: int, step: int, *stream: int) -> int:
    """The seed of one random stream of one step."""
    return int(hash_words(seed, step, *stream)) >> 1  # 63 bits, as torch takes
