"""Step 6: the masked batch of one optimizer step, the same for any number of processes.

Masks and dropped conditions are drawn for the whole global batch from (seed, step), then sliced.
Nothing but (seed, step) decides what is random, so a resumed run needs no generator state. Draws
are made on the host: the same on every device, and what is scored is known without waiting for a
GPU. (Dropout depends on device and process.)
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train_stage.loading.loader import Batch
from train_stage.loading.order import hash_words
from train_stage.models.token_transformer import TokenTransformer
from train_stage.objective.config import ObjectiveFields
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
    model: TokenTransformer,
    config: ObjectiveFields,
    seed: int,
    schedule: Schedule,
    rank: int,
    world_size: int,
    device: torch.device,
) -> MaskedBatch:
    """Hides codes of a batch and adds the class token, dropped with cond_dropout_prob."""
    share, length = batch.codes.shape
    rows = share * world_size
    generator = torch.Generator().manual_seed(stream_seed(seed, batch.step, MASKS))
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


def stream_seed(seed: int, step: int, *stream: int) -> int:
    """The seed of one random stream of one step."""
    return int(hash_words(seed, step, *stream)) >> 1  # 63 bits, as torch takes
