"""The last linear map and the cross-entropy together, so that few logits exist at a time (step 7).

Of the logits of M codes only a chunk is there at once, as tall as CHUNK_LOGITS numbers allow; its
gradients are made at once, too. M scored codes, E width, V outputs, c rows of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**24  # 64 MiB of float32

ChunkScores = tuple[Tensor, Tensor, Tensor, Tensor | None]
ScoreChunk = Callable[..., ChunkScores]  # score_chunk, or what torch.compile makes of it


class Scores(NamedTuple):
    """Of M scored codes. Only `total` can be differentiated."""

    total: Tensor  # () sum of the losses times their rows' weights
    losses: Tensor  # (M,) what is minimised (smoothed)
    plain: Tensor  # (M,) cross-entropy in nats
    correct: Tensor  # (M,) bool


def chunk_rows(outputs: int) -> int:
    """How many rows of V logits a chunk has."""
    return max(1, CHUNK_LOGITS // outputs)


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    chunk: int | None = None,
    compiled: ScoreChunk | None = None,
) -> Scores:
    """Cross-entropy of features (M, E) @ weight (V, E).T + bias (V,) with targets (M,) in [0, V).

    row_weight (M,): see Scores.total. chunk: chunk_rows(V) by default; where it holds all rows,
    autograd does the work. compiled: score_chunk compiled; it gets whole chunks only, the last one
    filled up, and so never sees another shape. Logits have autocast's dtype, losses float32.
    """
    rows, chunk = len(features), chunk or chunk_rows(len(weight))
    if row_weight is None:
        row_weight = torch.ones(rows, device=features.device)
    if compiled is None and rows <= chunk:
        return _score_at_once(features, weight, bias, targets, label_smoothing, row_weight)
    if compiled is not None and (missing := -rows % chunk):
        features = F.pad(features, (0, 0, 0, missing))
        targets, row_weight = F.pad(targets, (0, missing)), F.pad(row_weight, (0, missing))
    wants_gradient = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    score = compiled or score_chunk
    total, *each = _LinearCrossEntropy.apply(
        features, weight, bias, targets, row_weight, label_smoothing, chunk, score, wants_gradient
    )
    return Scores(total, *(values[:rows] for values in each))


def _score_at_once(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    row_weight: Tensor,
) -> Scores:
    logits = F.linear(features, weight, bias)  # (M, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    with torch.no_grad():
        plain = F.cross_entropy(logits, targets, reduction="none") if label_smoothing else losses
        correct = logits.argmax(-1) == targets
    return Scores((losses * row_weight).sum(), losses.detach(), plain.detach(), correct)


def score_chunk(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    label_smoothing: float,
    wants_gradient: bool,
) -> ChunkScores:
    """losses, plain, correct (c,) of c rows, and d total / d logits (c, V) in features' dtype."""
    logits = F.linear(features, weight, bias)  # (c, V)
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_probs, index = F.log_softmax(logits, -1, dtype=precise), targets.unsqueeze(-1)
    losses = plain = -log_probs.gather(-1, index).squeeze(-1)
    if label_smoothing:
        losses = (1 - label_smoothing) * plain - label_smoothing * log_probs.mean(-1)
    correct = log_probs.argmax(-1) == targets
    if not wants_gradient:
        return losses, plain, correct, None
    gradient = log_probs.exp_()  # softmax - smoothed target
    if label_smoothing:
        gradient.sub_(label_smoothing / len(weight))
    gradient.scatter_add_(-1, index, torch.full_like(index, label_smoothing - 1, dtype=precise))
    return losses, plain, correct, gradient.mul_(row_weight.unsqueeze(-1)).to(features.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass multiplies them by a number.

    To make the logits once more in the backward pass would cost a third more matrix products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weight: Tensor,
        label_smoothing: float,
        chunk: int,
        score: ScoreChunk,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device, dtype = features.device.type, features.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        matrix, vector = weight.to(dtype), None if bias is None else bias.to(dtype)
        d_features = torch.empty_like(features)
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=d_weight.dtype)
        each = []
        for start in range(0, len(features), chunk):
            rows = slice(start, start + chunk)
            x, options = features[rows].to(dtype), (label_smoothing, wants_gradient)
            *scores, d_logits = score(x, matrix, vector, targets[rows], row_weight[rows], *options)
            each.append(scores)
            if d_logits is not None:
                d_features[rows] = d_logits @ matrix
                d_weight += d_logits.T @ x
                if d_bias is not None:
                    d_bias += d_logits.sum(0, dtype=d_bias.dtype)
        losses, plain, correct = (torch.cat(values) for values in zip(*each, strict=True))
        ctx.save_for_backward(d_features, d_weight, d_bias)
        ctx.mark_non_differentiable(losses, plain, correct)
        return (losses * row_weight).sum(), losses, plain, correct

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = (None if d is None else d * d_total for d in ctx.saved_tensors)
        return (*gradients, *(None,) * 6)
