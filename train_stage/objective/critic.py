"""The critic's loss: which codes are the image's own, and which did a model draw? (step 7)

Hidden codes are filled with codes drawn once from a model's predictions; for every code of that
image the critic learns whether it is right. Sampling asks it which codes to draw again.
token: a model of its own against a frozen generator (Token-Critic, Lezama et al. 2022); self: a
second head on the trunk that is trained, against its own draws.
b rows, N codes and T tokens a row, M scored codes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train_stage.objective.buckets import BUCKETS


def fill(input_ids: Tensor, positions: Tensor, bucket: Tensor, drawn: Tensor) -> Tensor:
    """input_ids (b, T) with drawn (M,) at those positions (M,) whose codes are hidden."""
    flat = input_ids.flatten()
    at_positions = torch.where(bucket < BUCKETS, drawn, flat[positions])
    return flat.scatter(0, positions, at_positions).view_as(input_ids)


def critic_scores(
    model: Any,
    filled: Tensor,
    codes: Tensor,
    weight: Tensor | None,
    condition: dict[str, Any],
) -> dict[str, Tensor]:
    """Binary cross-entropy of model.critic over all codes of filled (b, T), as named scores.

    codes (b, N): the image's own; weight (b,): of each row's losses in critic_total, the only one
    that can be differentiated.
    """
    hidden = model.hidden_states(filled, **condition)[:, -codes.shape[1] :]  # no class token
    logits = model.critic(hidden).float()  # (b, N)
    is_own = filled[:, -codes.shape[1] :] == codes
    losses = F.binary_cross_entropy_with_logits(logits, is_own.float(), reduction="none")
    total = losses.sum() if weight is None else (losses * weight[:, None]).sum()
    return {
        # and nothing of the logits: wrappers wait for a gradient of every parameter
        "critic_total": total + 0 * model.logits(hidden[:1, :1]).sum(),
        "critic_losses": losses.detach(),
        "critic_correct": (logits.detach() > 0) == is_own,
    }
