"""Targets that are distributions over a few codes instead of one code (step 7).

stored: the codes nearest to the *latent* of the image at that place, softmax(-||z - e_k||² / T), as
muse-tokenize wrote them beside the codes: they know what rounding to one code lost.
recomputed: the codes nearest to the *code*, softmax(-||e_code - e_k||² / T), from the codebook
alone: one row a code, for any store, but the same wherever the code stands.

K codes, k of them in a target, M scored codes.
"""

import torch
from torch import Tensor

from configs.load import ConfigError

IDS, WEIGHTS = "topk_codes", "topk_weights"


def topk_columns(codes_column: str) -> tuple[str, str]:
    """The columns that hold the stored targets of a column of codes."""
    suffix = codes_column.removeprefix("codes")
    return IDS + suffix, WEIGHTS + suffix


def stored_targets(columns: dict[str, Tensor], is_scored: Tensor) -> dict[str, Tensor]:
    """soft_ids (M, k) int64 and soft_weights (M, k) float32, summing to 1, of the scored codes.

    columns: a batch's, with those of topk_columns, (b, N, k); is_scored (b, N) bool.
    """
    ids, weights = (column[is_scored] for column in find_topk(columns))
    return {"soft_ids": ids.long(), "soft_weights": to_one(weights.float())}


def drawn_targets(columns: dict[str, Tensor], draw: Tensor) -> Tensor:
    """A code of each stored target, by its weight: (b, N) int64; draw (b, N) uniform in [0, 1)."""
    ids, weights = find_topk(columns)
    passed = to_one(weights.float()).cumsum(-1)[..., :-1] <= draw.unsqueeze(-1)
    return ids.long().gather(-1, passed.sum(-1, keepdim=True)).squeeze(-1)


def find_topk(columns: dict[str, Tensor]) -> list[Tensor]:
    """Ids and weights (b, N, k) of a batch's columns. Raises ConfigError where there are none."""
    found = [[c for c in columns if c.startswith(name)] for name in (IDS, WEIGHTS)]
    if any(len(names) != 1 for names in found):
        raise ConfigError(
            f"training.soft_targets=stored needs the columns {IDS} and {WEIGHTS}, the batch has "
            f"{', '.join(columns) or 'none'}: store them (muse-tokenize), or take "
            "soft_targets=recomputed"
        )
    return [columns[name] for (name,) in found]


def codebook_targets(codebook: Tensor, temperature: float, count: int) -> tuple[Tensor, Tensor]:
    """Recomputed targets of every code: ids (K, k) int64, nearest first, weights (K, k) float32.

    codebook (K, C), as compared with latents; weights sum to 1 over the k.
    """
    codebook, count = codebook.float(), min(count, len(codebook))
    found = []
    for part in codebook.split(1024):  # (1024, K) distances at a time
        distance = torch.cdist(part, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
        found.append(distance.topk(count, largest=False))
    nearest, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ids, (-nearest / temperature).softmax(-1)


def to_one(weights: Tensor) -> Tensor:
    """weights (…, k) scaled to sum to 1."""
    return weights / weights.sum(-1, keepdim=True)
