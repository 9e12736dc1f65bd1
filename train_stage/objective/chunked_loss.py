"""The last linear map and the cross-entropy together, so that few logits exist at a time (step 7).

Of the logits of M codes only a chunk is there at once, as tall as CHUNK_LOGITS numbers allow; its
gradients are made at once, too. M scored codes, E width, V outputs, c rows of a chunk, k codes of
a soft target.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**24  # 64 MiB of float32

ChunkScores = tuple[Tensor, Tensor, Tensor, Tensor | None]
ScoreChunk = Callable[..., ChunkScores]  # score_chunk, or what torch.compile makes of it
SoftTargets = tuple[Tensor, Tensor]  # (M, k) each: codes, and their shares, which sum to 1


class Scores(NamedTuple):
    """Of M scored codes. Only `total` can be differentiated."""

    total: Tensor  # () sum of the losses times their rows' weights
    losses: Tensor  # (M,) what is minimised (smoothed, soft)
    plain: Tensor  # (M,) cross-entropy with the code itself, in nats
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
    soft: SoftTargets | None = None,
) -> Scores:
    """Cross-entropy of features (M, E) @ weight (V, E).T + bias (V,) with targets (M,) in [0, V).

    soft: distributions to predict instead. Smoothing mixes either with the uniform one.
    row_weight (M,): see Scores.total. chunk: chunk_rows(V) by default; where it holds all rows,
    autograd does the work. compiled: score_chunk compiled; it gets whole chunks only, the last one
    filled up, and so never sees another shape. Logits have autocast's dtype, losses float32.
    """
    rows, chunk = len(features), chunk or chunk_rows(len(weight))
    if row_weight is None:
        row_weight = torch.ones(rows, device=features.device)
    if compiled is None and rows <= chunk:
        return _score_at_once(features, weight, bias, targets, label_smoothing, row_weight, soft)
    ids, shares = soft or (None, None)
    if compiled is not None and (missing := -rows % chunk):
        features = F.pad(features, (0, 0, 0, missing))
        targets, row_weight = F.pad(targets, (0, missing)), F.pad(row_weight, (0, missing))
        ids, shares = (None if x is None else F.pad(x, (0, 0, 0, missing)) for x in (ids, shares))
    wants_gradient = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    score = compiled or score_chunk
    goal, options = (targets, ids, shares), (label_smoothing, wants_gradient)
    total, *each = _LinearCrossEntropy.apply(
        features, weight, bias, row_weight, goal, options, chunk, score
    )
    return Scores(total, *(values[:rows] for values in each))


def _score_at_once(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    row_weight: Tensor,
    soft: SoftTargets | None,
) -> Scores:
    logits = F.linear(features, weight, bias)  # (M, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if soft is None:
        losses = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    else:
        log_probs = logits.log_softmax(-1)
        losses = -(log_probs.gather(-1, soft[0]) * soft[1]).sum(-1)
        if label_smoothing:
            losses = (1 - label_smoothing) * losses - label_smoothing * log_probs.mean(-1)
    with torch.no_grad():
        same = soft is None and not label_smoothing
        plain = losses if same else F.cross_entropy(logits, targets, reduction="none")
        correct = logits.argmax(-1) == targets
    return Scores((losses * row_weight).sum(), losses.detach(), plain.detach(), correct)


def score_chunk(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    targets: Tensor,
    soft_ids: Tensor | None,
    soft_shares: Tensor | None,
    label_smoothing: float,
    wants_gradient: bool,
) -> ChunkScores:
    """losses, plain, correct (c,) of c rows, and d total / d logits (c, V) in features' dtype."""
    logits = F.linear(features, weight, bias)  # (c, V)
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_probs, index = F.log_softmax(logits, -1, dtype=precise), targets.unsqueeze(-1)
    losses = plain = -log_probs.gather(-1, index).squeeze(-1)
    shares = torch.ones_like(index, dtype=precise)
    if soft_ids is not None and soft_shares is not None:
        index, shares = soft_ids, soft_shares.to(precise)
        losses = -(log_probs.gather(-1, index) * shares).sum(-1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_probs.mean(-1)
    correct = log_probs.argmax(-1) == targets
    if not wants_gradient:
        return losses, plain, correct, None
    gradient = log_probs.exp_()  # softmax - smoothed target
    if label_smoothing:
        gradient.sub_(label_smoothing / len(weight))
    gradient.scatter_add_(-1, index, (label_smoothing - 1) * shares)
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
        row_weight: Tensor,
        goal: tuple[Tensor | None, ...],  # targets, soft_ids, soft_shares
        options: tuple[float, bool],  # label_smoothing, wants_gradient
        chunk: int,
        score: ScoreChunk,
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
            x, parts = features[rows].to(dtype), [None if g is None else g[rows] for g in goal]
            *scores, d_logits = score(x, matrix, vector, row_weight[rows], *parts, *options)
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
        return (*gradients, *(None,) * 5)
