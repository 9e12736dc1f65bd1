"""What a model predicts under a condition, with classifier-free guidance (Ho and Salimans 2022).

Step 8, between the models and the loop of parallel_decoding.py. As the last layer is linear, the
conditional and the unconditional prediction are mixed before it; it runs once, and at the positions
asked for only. What depends on the condition alone is computed once, and rows that do not differ
(images of one prompt, all without a condition) are one row of the first step.
B images, R rows of the model's batch (B, or 2 B with guidance), N codes, K codebook size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from train_stage.objective.mask_schedule import cosine_schedule
from train_stage.sampling.parallel_decoding import Compiler, Predict, take

GuidanceSchedule = Literal["linear", "cosine", "cosine_floor"]
Condition = Mapping[str, Tensor | None]
TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "cond_embeds"


def guidance_scales(
    scale: float, timesteps: int, schedule: GuidanceSchedule | None = None
) -> list[float] | None:
    """g of each step, T numbers; None for a scale of 0 or 1, where there is nothing to mix.

    Codes are drawn from u + g (c - u), u being predicted without the condition and c with it.
    Always `scale`; "linear", from 0 to it; "cosine", scale * cos(π/2 (1 - r)) with r = 1/T … 1;
    "cosine_floor", the same rounded down to whole numbers, as openMUSE does.
    """
    if schedule is not None and schedule not in get_args(GuidanceSchedule):
        legal = ", ".join(get_args(GuidanceSchedule))
        raise ValueError(f"guidance_schedule={schedule!r}: legal are null, {legal}")
    if scale <= 0:
        return None
    if schedule is None:
        return None if scale == 1 else [scale] * timesteps
    if schedule == "linear":
        return torch.linspace(0, scale, timesteps).tolist()
    left = [torch.tensor(1.0 - step / timesteps) for step in range(1, timesteps + 1)]
    scales = torch.stack([scale * cosine_schedule(t) for t in left])
    return (scales.floor() if schedule == "cosine_floor" else scales).tolist()


def predictor(
    model: Any,
    input_ids: Tensor,
    class_ids: Tensor | None,
    condition: Condition,
    negative: Condition,
    scales: Sequence[float] | None,
    grid: tuple[int, int] | None = None,
    compiler: Compiler | None = None,
) -> Predict:
    """What parallel_decoding.decode asks: `model` under its condition, at chosen positions.

    input_ids (B, N) of the first step; class_ids (B or 1,); condition: the keywords of
    model.context, B or 1 rows each; negative: the same for the unconditional half of the batch,
    which there is with scales, one a step, and a class or text; without one, the model's learned
    null text, if it has that.
    """
    if class_ids is None and condition.get(TEXT) is None:
        scales = None  # nothing to guide towards
    head = compiler(guided_logits) if compiler else guided_logits
    options = {} if grid is None else {"grid": grid}
    mix = None if scales is None else torch.tensor(scales, device=input_ids.device)
    tokens = class_tokens(model, class_ids, len(input_ids), mix is not None)
    keywords = full_condition(model, condition, negative, len(input_ids), mix is not None)

    def batch(ids: Tensor, first: Tensor | None) -> Tensor:  # (B, N) -> (R, T)
        ids = ids if mix is None else torch.cat([ids, ids])
        return ids if first is None else torch.cat([first, ids], 1)

    start = batch(input_ids, tokens)
    no_code = None if tokens is None else torch.full_like(tokens, model.mask_token_id)
    distinct, index = distinct_rows([start, *keywords.values()])
    few = model.context(**{name: value[distinct] for name, value in keywords.items()})
    repeats = len(distinct) < len(index)
    context = select_rows(few, index) if repeats else few

    def predict(
        ids: Tensor, positions: Tensor, step: int, previous: Tensor | None = None
    ) -> Tensor:
        if repeats and ids is input_ids:  # the first step
            with torch.compiler.set_stance("force_eager"):  # compiled layers keep to one shape
                hidden = model.hidden_states(start[distinct], context=few, **options)[index]
        else:
            more = {} if previous is None else {"previous": batch(previous, no_code)}
            hidden = model.hidden_states(  # (R, T, E)
                batch(ids, tokens), context=context, **options, **more
            )
        hidden = hidden if tokens is None else hidden[:, 1:]
        return head(model, hidden, positions, None if mix is None else mix[step])

    return predict


def class_tokens(model: Any, class_ids: Tensor | None, images: int, guided: bool) -> Tensor | None:
    """What stands before the codes: K + class, and the mask id where there is no class; (R, 1)."""
    if class_ids is None:
        return None
    tokens = rows_of("class_ids", class_ids + model.config.codebook_size, images, ()).unsqueeze(1)
    return torch.cat([tokens, torch.full_like(tokens, model.mask_token_id)]) if guided else tokens


def full_condition(
    model: Any, condition: Condition, negative: Condition, images: int, guided: bool
) -> dict[str, Tensor]:
    """batch_condition; a model that learned a null text gets that where no negative is given."""
    learned = getattr(model.config, "null_text_length", None)
    given = {name: x for name in (TEXT, POOLED) if (x := condition.get(name)) is not None}
    if not (learned and guided and given) or any(x is not None for x in negative.values()):
        return batch_condition(condition, negative, images, guided)
    nothing = {name: torch.zeros_like(x[:1]) for name, x in given.items()}
    batch = batch_condition(condition, nothing, images, guided)
    is_second_half = torch.arange(2 * images, device=given[TEXT].device) >= images
    return batch | {"dropped": is_second_half}  # the model puts its own there


def batch_condition(
    condition: Condition, negative: Condition, images: int, guided: bool
) -> dict[str, Tensor]:
    """The conditions that there are, (R, …) each.

    In the unconditional half text without a negative is zeros, and what has no negative stays.
    Raises ValueError for shapes that do not fit, and for pooled text without a negative.
    """
    given = {name: x for name, x in condition.items() if x is not None}
    other = {name: x for name, x in negative.items() if x is not None}
    if guided and POOLED in given and not {TEXT, POOLED} <= other.keys():
        raise ValueError(
            "guidance needs negative_embeds and negative_cond_embeds, what the text encoder makes "
            "of an empty text; or take guidance_scale=0"
        )
    if guided and TEXT in given:
        other.setdefault(TEXT, torch.zeros_like(given[TEXT]))
        if MASK in given or MASK in other:
            for half in (given, other):
                text = half[TEXT]
                half.setdefault(MASK, torch.ones(text.shape[:2], device=text.device))
    batch = {}
    for name, x in given.items():
        batch[name] = rows_of(name, x, images, x.shape[1:])
        if guided:
            absent = rows_of(f"negative {name}", other.get(name, x), images, x.shape[1:])
            batch[name] = torch.cat([batch[name], absent])
    return batch


def rows_of(name: str, x: Tensor, images: int, shape: Sequence[int]) -> Tensor:
    """x as (images, *shape); one row stands for all. Raises ValueError for another shape."""
    if len(x) not in (1, images) or x.shape[1:] != tuple(shape):
        wanted = f"(1 or {images}, {', '.join(map(str, shape))})"
        raise ValueError(f"{name} has the shape {tuple(x.shape)}: wanted is {wanted}")
    return x.expand(images, *shape)


def guided_logits(model: Any, hidden: Tensor, positions: Tensor, scale: Tensor | None) -> Tensor:
    """hidden (R, N, E), positions (B, L) -> logits (B, L, K) of the codes at those positions."""
    if scale is not None:
        positions = torch.cat([positions, positions])
    features = model.head(take(hidden, positions))  # (R, L, E')
    if scale is not None:
        conditional, unconditional = features.chunk(2)
        features = unconditional + scale * (conditional - unconditional)
    weight, bias = model.output_layer()
    size = model.config.codebook_size
    return F.linear(features, weight[:size], None if bias is None else bias[:size])


def distinct_rows(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows that differ from the row before in any of the tensors (R, …), and whose copy each is.

    Two int64 tensors (M,), M <= R, and (R,) in [0, M): x[distinct][index] equals x.
    """
    unlike = [(x[1:] != x[:-1]).unsqueeze(-1).flatten(1).any(-1) for x in tensors]
    differs = torch.stack(unlike).any(0)
    is_new = F.pad(differs, (1, 0), value=True)
    return is_new.nonzero().squeeze(1), is_new.cumsum(0) - 1  # a sync, before the first step


def select_rows(context: Any, index: Tensor) -> Any:
    """A nested tuple of tensors (M, …), or None, with rows `index` (R,) of each."""
    if context is None:
        return None
    if isinstance(context, Tensor):
        return context[index]
    parts = [select_rows(part, index) for part in context]
    return type(context)(*parts) if hasattr(context, "_fields") else tuple(parts)
