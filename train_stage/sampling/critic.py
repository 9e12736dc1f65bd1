"""Which codes look drawn: a critic decides what decoding hides again (Lezama et al. 2022).

Step 8, beside guidance.py: the loop of parallel_decoding.py asks it about the codes of a step.
B images, N codes.
"""

from typing import Any

import torch
from torch import Tensor

from train_stage.sampling.guidance import Condition, batch_condition, class_tokens
from train_stage.sampling.parallel_decoding import Judge


def judge_of(
    critic: Any,
    model: Any,
    class_ids: Tensor | None,
    condition: Condition,
    images: int,
    grid: tuple[int, int] | None = None,
) -> Judge | None:
    """What parallel_decoding.decode asks: the critic, under the condition of the images.

    critic: a model with a critic_head; "self", the one that draws; None. class_ids, condition: see
    guidance.predictor. Raises ValueError for a model without a critic, and for one of other codes.
    """
    if critic is None:
        return None
    critic = model if isinstance(critic, str) and critic == "self" else critic
    if not getattr(getattr(critic, "config", None), "critic_head", False):
        raise ValueError(
            "critic: legal are null, 'self' for a model trained with critic_head=true, or such a "
            f"model; this {type(critic).__name__} has no critic_head"
        )
    if critic.config.codebook_size != model.config.codebook_size:
        sizes = critic.config.codebook_size, model.config.codebook_size
        raise ValueError(f"the critic knows {sizes[0]} codes, the model {sizes[1]}")
    tokens = class_tokens(critic, class_ids, images, guided=False)
    context = critic.context(**batch_condition(condition, {}, images, guided=False))
    options = {} if grid is None else {"grid": grid}

    def judge(codes: Tensor) -> Tensor:
        ids = codes if tokens is None else torch.cat([tokens, codes], 1)
        hidden = critic.hidden_states(ids, context=context, **options)
        return critic.critic(hidden if tokens is None else hidden[:, 1:]).float().exp()

    return judge
