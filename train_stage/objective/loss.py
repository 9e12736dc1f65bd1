"""Losses and the diagnostics that go with them: logits + labels -> scalar.

Training makes no logits that it does not need: the trunk's output is taken at the scored positions
only, and chunked_loss.py goes on from there.

-100 in labels marks what is not scored. B batch, N codes, V outputs, M scored codes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_stage.objective.buckets import BUCKETS
from train_stage.objective.chunked_loss import (
    ScoreChunk,
    SoftTargets,
    chunk_rows,
    linear_cross_entropy,
    score_chunk,
)
from train_stage.objective.critic import critic_scores, fill
from train_stage.objective.predictions import best_codes, drawn_codes, entropies

IGNORE = -100


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


class MaskedLoss(nn.Module):
    """The training path: hidden states -> head on scored positions only -> losses.

    A module of its own so that DistributedDataParallel can wrap it; holds the model, no weights.
    """

    def __init__(
        self,
        model: Any,
        label_smoothing: float = 0.0,
        soft_table: SoftTargets | None = None,
        generator: Any = None,
        grid: tuple[int, int] | None = None,
    ):
        """soft_table: targets of every code, (K, k) each (soft_targets.codebook_targets).
        generator: a frozen TokenTransformer; the model then learns to judge its codes only.
        grid: (h, w) of the codes for a U-ViT, if no square.
        """
        super().__init__()
        self.model: Any  # a TokenTransformer
        self.model, self.label_smoothing, self.soft_table = model, label_smoothing, soft_table
        self.generators = [] if generator is None else [generator]  # a list: no part of the module
        self.grid = {} if grid is None else {"grid": grid}
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
        self,
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor,
        bucket: Tensor | None = None,
        weight: Tensor | None = None,
        soft_ids: Tensor | None = None,
        soft_weights: Tensor | None = None,
        image: Tensor | None = None,
        previous: Tensor | None = None,
        codes: Tensor | None = None,
        draw: Tensor | None = None,
        critic_weight: Tensor | None = None,
        **condition: Any,
    ) -> dict[str, Tensor]:
        """Scores, by name, of input_ids and labels (b, T) at positions (M,) of their b * T.

        The caller knows where labels are not -100 without asking a GPU, which has to wait then.
        bucket (M,): BUCKETS where the code is visible; weight (M,); soft_ids, soft_weights (M, k);
        image (M,): the row, where entropies are wanted; previous (b, T) mask ids: predict once to
        condition on that. codes (b, N), draw (M,) in [0, 1), critic_weight (b,): the critic's, see
        critic.py. condition: the keywords of the model's hidden_states.
        """
        condition |= self.grid
        given = {"input_ids": input_ids, **condition}
        if previous is not None:
            given["previous"] = self.predict(given, positions, previous, bucket)
        out: dict[str, Tensor] = {} if bucket is None else {"bucket": bucket}
        teacher = self.generators[0] if self.generators else self.model  # whose codes are judged
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.generators):
            features = features_at(teacher, given, positions)  # (M, E)
        if not self.generators:
            soft = None if soft_ids is None or soft_weights is None else (soft_ids, soft_weights)
            out |= self.score(features, labels, positions, weight, soft)
        if bucket is not None and image is not None:
            out |= describe_entropy(teacher, features, image, len(labels), bucket)
        if bucket is not None and codes is not None and draw is not None:
            drawn = drawn_codes(features, *code_layer(teacher), draw)
            filled = fill(input_ids, positions, bucket, drawn)
            judged = critic_scores(self.model, filled, codes, critic_weight, condition)
            out |= judged | {"total": out.get("total", 0) + judged["critic_total"]}
        return out

    def score(
        self,
        features: Tensor,
        labels: Tensor,
        positions: Tensor,
        weight: Tensor | None,
        soft: SoftTargets | None,
    ) -> dict[str, Tensor]:
        """The cross-entropy of features (M, E), by name. Soft targets are over the K codes only."""
        targets = labels.flatten()[positions]
        if self.soft_table is not None:
            soft = (self.soft_table[0][targets], self.soft_table[1][targets])
        matrix, bias = self.model.output_layer() if soft is None else code_layer(self.model)
        scores = linear_cross_entropy(
            features,
            matrix,
            bias,
            targets,
            self.label_smoothing,
            weight,
            min(labels.numel(), chunk_rows(len(matrix))),
            self.compiled,
            soft,
        )
        ones = torch.ones_like(scores.plain) if weight is None else weight
        return scores._asdict() | {"weight": ones}

    @torch.no_grad()
    def predict(
        self,
        given: dict[str, Any],
        positions: Tensor,
        previous: Tensor,
        bucket: Tensor | None = None,
    ) -> Tensor:
        """previous (b, T) with the model's best codes at the scored positions that are hidden.

        Where codes are visible sampling has no prediction, and so there is none here.
        """
        features = features_at(self.model, {**given, "previous": previous}, positions)
        best = best_codes(features, *code_layer(self.model))
        if bucket is not None:
            best = torch.where(bucket < BUCKETS, best, previous.flatten()[positions])
        torch.clear_autocast_cache()  # torch 2.9 would use weights cast here, without gradient
        return previous.flatten().scatter(0, positions, best).view_as(previous)


def features_at(model: Any, given: dict[str, Any], positions: Tensor) -> Tensor:
    """What the output layer reads at positions (M,) of all: (M, E)."""
    return model.head(model.hidden_states(**given).flatten(0, 1).index_select(0, positions))


def code_layer(model: Any) -> tuple[Tensor, Tensor | None]:
    """The rows of a model's output layer that are codes: (K, E), (K,)."""
    weight, bias = model.output_layer()
    size = model.config.codebook_size
    return weight[:size], None if bias is None else bias[:size]


def describe_entropy(
    model: Any, features: Tensor, image: Tensor, images: int, bucket: Tensor
) -> dict[str, Tensor]:
    """Entropies of each image's hidden codes, and its bucket, (images,) each, by name."""
    matrix, bias = model.output_layer()
    by_code, average = entropies(features, matrix, bias, image, images, bucket < BUCKETS)
    bucket = torch.full((images,), BUCKETS, device=bucket.device).scatter_reduce(
        0, image, bucket, "amin"
    )
    return {"entropy_token": by_code, "entropy_image": average, "entropy_bucket": bucket}
