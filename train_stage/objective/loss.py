"""Losses and the diagnostics that go with them: logits + labels -> scalar.

Training makes no logits that it does not need: the trunk's output is taken at the scored positions
only, and chunked_loss.py goes on from there.

-100 in labels marks what is not scored. B batch, N codes, V outputs, M scored codes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_stage.objective.chunked_loss import (
    ScoreChunk,
    chunk_rows,
    linear_cross_entropy,
    score_chunk,
)

IGNORE = -100
BUCKETS = 10  # of the share of masked codes: (0, .1], (.1, .2], … (.9, 1]


def token_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over scored codes: logits (B, N, V), labels (B, N).

    With weight (B, N): sum(loss_i weight_i) / sum(weight_i) over all codes, where codes that are
    not scored count 0 above and their weight below, as published.
    """
    reduction = "mean" if weight is None else "none"
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return losses if weight is None else (losses * weight.flatten()).sum() / weight.sum()


def masked_loss(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """token_loss of a model's hidden states (B, N, E), head and logits on scored codes only."""
    labels = labels.flatten()
    positions = (labels != IGNORE).nonzero().squeeze(-1)  # (M,); a sync on a GPU
    features = model.head(hidden.flatten(0, 1).index_select(0, positions))
    matrix, bias = model.output_layer()
    row_weight = None if weight is None else weight.flatten()[positions]
    scores = linear_cross_entropy(
        features, matrix, bias, labels[positions], label_smoothing, row_weight
    )
    return scores.total / (len(positions) if weight is None else weight.sum())


def soft_target_cross_entropy(logits: Tensor, labels: Tensor, soft_targets: Tensor) -> Tensor:
    """Cross-entropy against distributions: soft_targets (B, N, K), averaged over scored codes.

    With one more position in `labels` than in `soft_targets` the first is the class token and is
    dropped. (The reference always drops position 0, which loses a code of unconditional models.)
    """
    extra = labels.shape[1] - soft_targets.shape[1]
    if extra not in (0, 1):
        raise ValueError(f"{labels.shape[1]} labels for {soft_targets.shape[1]} soft targets")
    logits, labels = logits[:, extra:, : soft_targets.shape[-1]], labels[:, extra:]
    losses = -(soft_targets * F.log_softmax(logits, dim=-1)).sum(-1)  # (B, N)
    scored = labels != IGNORE
    return (losses * scored).sum() / scored.sum()


class MaskedLoss(nn.Module):
    """The training path: hidden states -> head on scored positions only -> losses.

    A module of its own so that DistributedDataParallel can wrap it; holds the model, no weights.
    """

    def __init__(self, model: Any, label_smoothing: float = 0.0):
        super().__init__()
        self.model: Any  # a TokenTransformer
        self.model, self.label_smoothing = model, label_smoothing
        self.compiled: ScoreChunk | None = None

    def compile_parts(self, backend: Any = "inductor") -> None:
        """Compiles the repeated blocks and the chunk loss, whose shapes are always the same.

        What depends on how many codes are scored (taking them, the head) stays outside.
        """
        options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
        for layer in self.model.layers():
            layer.compile(**options)
        self.compiled = torch.compile(score_chunk, **options)

    def forward(
        self, input_ids: Tensor, labels: Tensor, positions: Tensor, **condition: Tensor
    ) -> dict[str, Tensor]:
        """Scores, by name, of input_ids and labels (B, T) at positions (M,) of their B * T.

        The caller knows where labels are not -100 without asking a GPU, which has to wait then.
        condition: the keywords of the model's hidden_states.
        """
        hidden = self.model.hidden_states(input_ids, **condition)
        weight, bias = self.model.output_layer()
        scores = linear_cross_entropy(
            self.model.head(hidden.flatten(0, 1).index_select(0, positions)),
            weight,
            bias,
            labels.flatten()[positions],
            self.label_smoothing,
            chunk=min(labels.numel(), chunk_rows(len(weight))),
            compiled=self.compiled,
        )
        return scores._asdict()


def masked_buckets(input_ids: Tensor, mask_id: int) -> Tensor:
    """The bucket (0..9) of each row by its share of masked ids: (B, N) -> (B,) int64."""
    return bucket_of((input_ids == mask_id).float().mean(-1))


def bucket_of(share: Tensor) -> Tensor:
    """Shares in (0, 1] -> bucket index 0..9; a share on an edge belongs to the lower bucket."""
    edges = torch.arange(1, BUCKETS, device=share.device) / BUCKETS
    return torch.bucketize(share, edges)


def entropy_by_bucket(logits: Tensor, input_ids: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Mean entropies (nats) in each bucket of masked share: two (10,) tensors, 0 where empty.

    First: of each masked code's distribution, averaged over the codes of an image. Second: of the
    image's average distribution. A wide gap means that codes disagree about what comes.
    """
    masked = (input_ids == mask_id).unsqueeze(-1)  # (B, N, 1)
    probabilities = logits.softmax(-1)
    count = masked.sum((1, 2)).clamp(min=1)
    by_code = (_entropy(probabilities) * masked.squeeze(-1)).sum(-1) / count  # (B,)
    by_image = _entropy((probabilities * masked).sum(1) / count.unsqueeze(-1))  # (B,)
    bucket = masked_buckets(input_ids, mask_id)
    return mean_by_bucket(by_code, bucket), mean_by_bucket(by_image, bucket)


def mean_by_bucket(values: Tensor, bucket: Tensor) -> Tensor:
    """Mean of values (B,) in each of the ten buckets; 0 where there are none."""
    total = torch.zeros(BUCKETS, dtype=values.dtype, device=values.device)
    total = total.index_add(0, bucket, values)
    return total / torch.bincount(bucket, minlength=BUCKETS).clamp(min=1)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=1e-20).log()).sum(-1)
