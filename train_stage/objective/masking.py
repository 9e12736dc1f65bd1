"""Step 6: which codes are hidden. Masks are drawn for a whole global batch from one generator,
so that they do not depend on how many processes share it.

B rows, N codes a row.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train_stage.objective.loss import IGNORE
from train_stage.objective.mask_schedule import Schedule


@dataclass
class MaskDraw:
    """mask (B, N) bool, True = hidden; ratio (B,) the drawn mask ratio of each row."""

    mask: Tensor
    ratio: Tensor


def draw_mask(
    rows: int,
    codes: int,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    min_masking_rate: float = 0.0,
    contiguous_region_prob: float | None = None,
    fixed_ratios: Sequence[float] | None = None,
    rng: random.Random | None = None,
    grid: tuple[int, int] | None = None,
    stratified: bool = False,
    needed: slice = slice(None),
) -> MaskDraw:
    """Draws masks for `rows` rows of `codes` codes, on the generator's device.

    The ratio is schedule(u), u uniform, at least min_masking_rate; round(ratio * N) codes (one at
    least) are hidden, anywhere, or, with contiguous_region_prob, in one rectangle of the grid
    (h, w), square when None. fixed_ratios: each row takes one of these instead (evaluation). `rng`
    makes the choices that are not tensors; those two need it. stratified: see stratified_uniform.
    needed: the rows whose masks are used; of others only the ratio and the number of hidden codes
    are right, which saves sorting their draws.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    if (fixed_ratios or contiguous_region_prob) and rng is None:
        raise ValueError("fixed_ratios and contiguous_region_prob need an rng (random.Random)")
    if fixed_ratios:
        ratio = torch.tensor(rng.choices(fixed_ratios, k=rows), device=device)  # type: ignore[union-attr]
    else:
        u = torch.rand(rows, generator=generator, device=device)
        u = stratified_uniform(u, generator) if stratified else u
        ratio = schedule(u).clip(min_masking_rate)
    hidden = (codes * ratio).round().clamp(min=1)  # (B,)
    if contiguous_region_prob and rng.random() < contiguous_region_prob:  # type: ignore[union-attr]
        side = math.isqrt(codes)
        mask = draw_rectangles(hidden, grid or (side, side), rng)  # type: ignore[arg-type]
    else:
        draws = torch.rand(rows, codes, generator=generator, device=device)
        order = torch.arange(codes, device=device).repeat(rows, 1)
        order[needed] = draws[needed].argsort(dim=-1)
        mask = order < hidden.unsqueeze(-1)
    return MaskDraw(mask, ratio)


def stratified_uniform(u: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """u (B,) uniform -> (B,), each still uniform, with exactly one in each [i / B, (i + 1) / B).

    Which row gets which is drawn. The variance of a mean over the batch falls by a factor of about
    B², against independent draws (variational diffusion does so with its times, Kingma 2021).
    """
    cell = torch.randperm(len(u), generator=generator, device=u.device)
    return (cell + u) / len(u)


def draw_rectangles(hidden: Tensor, grid: tuple[int, int], rng: random.Random) -> Tensor:
    """One rectangle a row with at least hidden[i] codes of the grid (h, w): (B, h * w) bool."""
    tall, wide = grid
    mask = torch.zeros(len(hidden), tall, wide, dtype=torch.bool, device=hidden.device)
    for row, count in enumerate(hidden.long().tolist()):
        height = rng.randint(math.ceil(count / wide), min(tall, count))
        width = min(math.ceil(count / height), wide)
        top, left = rng.randint(0, tall - height), rng.randint(0, wide - width)
        mask[row, top : top + height, left : left + width] = True
    return mask.flatten(1)


def apply_mask(codes: Tensor, mask: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """codes, mask (B, N) -> input_ids with mask_id where hidden, labels with -100 elsewhere."""
    return torch.where(mask, mask_id, codes), torch.where(mask, codes, IGNORE)


def predict_all_weights(draw: MaskDraw, visible: float = 0.3) -> Tensor:
    """Loss weights (B, N) for predicting every code: 1 where hidden, 1 - (1-r)(1-0.3) elsewhere."""
    elsewhere = 1.0 - (1.0 - draw.ratio.unsqueeze(-1)) * (1.0 - visible)
    return torch.where(draw.mask, 1.0, elsewhere)


def class_tokens(class_ids: Tensor, dropped: Tensor, codebook_size: int, mask_id: int) -> Tensor:
    """The token that stands first: codebook_size + class_id, or the mask id for "no class".

    class_ids (B,), -1 = the row has none; dropped (B,) bool = condition dropout. -> (B,)
    """
    return torch.where(dropped | (class_ids < 0), mask_id, class_ids + codebook_size)


def prepend_token(input_ids: Tensor, labels: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Puts `token` (B,) first, unscored: (B, N) -> (B, 1 + N) twice."""
    token = token.unsqueeze(-1)
    return torch.cat([token, input_ids], -1), torch.cat(
        [torch.full_like(token, IGNORE), labels], -1
    )
