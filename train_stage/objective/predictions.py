"""What a model predicts at the scored positions, a chunk of logits at a time (step 7).

For what training looks at beside the loss: its best codes (self-conditioning), codes drawn from it
(critics) and its entropies. Nothing here is differentiable. M scored codes, V outputs, K codes.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from train_stage.objective.chunked_loss import chunk_rows


def logit_chunks(
    features: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, float32 logits (c, V) of these rows) of features (M, E), weight (V, E), bias (V,)."""
    size = chunk_rows(len(weight))
    for start in range(0, len(features), size):
        rows = slice(start, start + size)
        yield rows, F.linear(features[rows], weight, bias).float()


@torch.no_grad()
def best_codes(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The likeliest code of each row: (M,)."""
    best = torch.empty(len(features), dtype=torch.long, device=features.device)
    for rows, logits in logit_chunks(features, weight, bias):
        best[rows] = logits.argmax(-1)
    return best


@torch.no_grad()
def drawn_codes(features: Tensor, weight: Tensor, bias: Tensor | None, draw: Tensor) -> Tensor:
    """A code from each row's distribution: (M,); draw (M,) uniform in [0, 1) decides which.

    One number a code, made anywhere, so that the codes do not depend on device or processes.
    """
    drawn = torch.empty(len(features), dtype=torch.long, device=features.device)
    for rows, logits in logit_chunks(features, weight, bias):
        reached = logits.softmax(-1).cumsum(-1)  # (c, K)
        wanted = draw[rows, None] * reached[:, -1:]
        found = torch.searchsorted(reached, wanted, right=True).squeeze(-1)
        drawn[rows] = found.clamp(max=len(weight) - 1)
    return drawn


@torch.no_grad()
def entropies(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    images: int,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two entropies (nats) of each of `images` images: (images,) twice.

    First: of each code's distribution, averaged over the codes of the image. Second: of the
    image's average distribution. A wide gap means that codes disagree about what comes.
    image (M,): whose code it is; counts (M,): 0 leaves a code out.
    """
    given = torch.ones_like(image, dtype=torch.float32) if counts is None else counts.float()
    by_code = torch.zeros(images, device=features.device)
    average = torch.zeros(images, len(weight), device=features.device)
    for rows, logits in logit_chunks(features, weight, bias):
        probabilities = logits.softmax(-1)
        by_code.index_add_(0, image[rows], _entropy(probabilities) * given[rows])
        average.index_add_(0, image[rows], probabilities.mul_(given[rows, None]))
    number = torch.zeros_like(by_code).index_add_(0, image, given).clamp(min=1)
    return by_code / number, _entropy(average.div_(number[:, None]))


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=1e-20).log()).sum(-1)
