"""Step 8: codes from a condition, by parallel decoding (MaskGIT, Chang et al. 2022, section 3.2).

`generate` serves every transformer: it gathers the condition here, asks the model through
guidance.py and runs the loop of parallel_decoding.py. B images, N codes, K codebook size, S text
positions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train_stage.objective.mask_schedule import Schedule, get_mask_schedule
from train_stage.sampling.critic import judge_of
from train_stage.sampling.guidance import (
    MASK,
    POOLED,
    TEXT,
    GuidanceSchedule,
    guidance_scales,
    predictor,
    rows_of,
)
from train_stage.sampling.parallel_decoding import (
    Compiler,
    TemperatureDecay,
    decode,
    gumbel,
    hidden_counts,
    step_temperatures,
    uniform_noise,
)

PUBLISHED_LENGTH = 256  # codes of an image for a U-ViT, which has no number of its own


@torch.no_grad()
def generate(
    model: Any,
    class_ids: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    cond_embeds: Tensor | None = None,
    micro_conds: Tensor | None = None,
    negative_embeds: Tensor | None = None,
    negative_cond_embeds: Tensor | None = None,
    negative_attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
    temperature: float | tuple[float, float] = 1.0,
    timesteps: int = 18,
    guidance_scale: float = 0.0,
    guidance_schedule: GuidanceSchedule | None = None,
    noise_schedule: str | Schedule = "cosine",
    temperature_decay: TemperatureDecay | None = None,
    starting_mask_ratio: float = 1.0,
    first_step: int = 0,
    seq_len: int | None = None,
    rows: int | None = None,
    grid: tuple[int, int] | None = None,
    return_intermediate: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
    compiler: Compiler | None = None,
    generator: torch.Generator | None = None,
    critic: Any = None,
) -> Any:
    """Codes (B, N) int64 in [0, K) from a MaskGitTransformer or a MaskGiTUViT.

    class_ids (B,), or what the model's forward takes, one row standing for all; without, `rows`
    images. negative_…: what the unconditional half gets, by default the null text that the model
    learned, or zeros. input_ids with mask ids says what to fill in (in-painting;
    starting_mask_ratio then scales the schedule); with first_step > 0 decoding begins there (image
    to image: add_mask_noise). temperature_decay is "linspace" for models with cond_embeds, "linear"
    for others. N: input_ids, seq_len, grid (h, w) or the model says. return_intermediate: (codes,
    draws of every step). generator: on the model's device or the CPU. critic: "self", or a model
    with a critic_head, says which codes look drawn and are hidden again, in place of the least
    probable: one more forward a step. More: guidance_scales, step_temperatures, decode. Raises
    ValueError for what does not fit.
    """
    check_classes(model, class_ids)
    condition = {TEXT: encoder_hidden_states, MASK: encoder_attention_mask}
    condition |= {POOLED: cond_embeds, "micro_conds": micro_conds}
    negative = {TEXT: negative_embeds, MASK: negative_attention_mask, POOLED: negative_cond_embeds}
    images = count_images(rows, class_ids, input_ids, *condition.values())
    ids = all_masks(model, images, seq_len, grid) if input_ids is None else input_ids
    ids = rows_of("input_ids", ids, images, ids.shape[1:])
    scales = guidance_scales(guidance_scale, timesteps, guidance_schedule)
    predict = predictor(model, ids, class_ids, condition, negative, scales, grid, compiler)
    left = hidden_counts(as_schedule(noise_schedule), timesteps, ids.shape[1], starting_mask_ratio)
    decay = temperature_decay or ("linear" if cond_embeds is None else "linspace")
    cooled = step_temperatures(temperature, timesteps, decay)
    judge = judge_of(critic, model, class_ids, condition, images, grid)
    draws: list[Tensor] | None = [] if return_intermediate else None
    codes = decode(
        predict, ids, model.mask_token_id, left, cooled, first_step, generator, callback, draws,
        compiler, judge, model.config.self_conditioning,
    )  # fmt: skip
    return (codes, draws) if return_intermediate else codes


@torch.no_grad()
def generate_by_score(
    model: Any,
    class_ids: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    temperature: float = 1.0,
    topk_filter_thres: float = 0.9,
    timesteps: int = 18,
    guidance_scale: float = 3.0,
    noise_schedule: str | Schedule = "cosine",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The reference's older `generate`: codes may be masked again at every step. (B, N) int64.

    The least probable codes are hidden, top-k filtered logits are sampled with Gumbel noise, and
    every position gets a new score. guidance_scale is for text only.
    """
    check_classes(model, class_ids)
    schedule, mask_id = as_schedule(noise_schedule), model.mask_token_id
    ids = all_masks(model, count_images(None, class_ids, encoder_hidden_states))
    guidance = 0.0 if encoder_hidden_states is None else guidance_scale
    scales = guidance_scales(guidance, timesteps)
    predict = predictor(model, ids, class_ids, {TEXT: encoder_hidden_states}, {}, scales)
    everywhere = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    scores = torch.zeros(ids.shape, device=ids.device)
    for step, t in enumerate(torch.linspace(0, 1, timesteps)):
        count = max(int((schedule(t) * ids.shape[1]).item()), 1)
        ids = ids.scatter(1, scores.topk(count, dim=-1).indices, mask_id)
        logits = predict(ids, everywhere, step)
        cooled = temperature * (timesteps - 1 - step) / timesteps
        draw = gumbel_sample(top_k(logits, topk_filter_thres), cooled, generator=generator)
        ids = torch.where(ids == mask_id, draw, ids)
        scores = 1 - logits.softmax(-1).gather(-1, draw.unsqueeze(-1)).squeeze(-1)
    return ids


def add_mask_noise(
    codes: Tensor, ratio: float, mask_id: int, generator: torch.Generator | None = None
) -> Tensor:
    """codes (B, N) of an image, each one hidden with probability `ratio`.

    Image to image: generate(input_ids=…, first_step=k) of these with the ratio schedule(k / T),
    k = T - floor(strength T), so that strength 1 hides everything.
    """
    uniform = uniform_noise(codes.shape, codes.device, generator)
    return torch.where(uniform < ratio, mask_id, codes)


def gumbel_sample(
    logits: Tensor,
    temperature: float = 1.0,
    dim: int = -1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Arg-max of logits / temperature + Gumbel noise; temperature 0 is the plain arg-max."""
    noise = gumbel(uniform_noise(logits.shape, logits.device, generator))
    return (logits / max(temperature, 1e-10) + noise).argmax(dim)


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keeps the ceil((1 - thres) V) largest of the last axis, the rest becomes -inf."""
    count = int(-(-((1 - thres) * logits.shape[-1]) // 1))
    values, places = logits.topk(count, dim=-1)
    return torch.full_like(logits, float("-inf")).scatter(-1, places, values)


def as_schedule(schedule: str | Schedule) -> Schedule:
    """A schedule by name, or as it is."""
    return get_mask_schedule(schedule) if isinstance(schedule, str) else schedule


def check_classes(model: Any, class_ids: Tensor | None) -> None:
    """Refuses class ids that the model does not have."""
    if class_ids is None or not len(class_ids):
        return
    classes = getattr(model.config, "num_classes", None)
    if not classes:
        raise ValueError("class_ids given, but the model has no classes (num_classes is null)")
    if not (0 <= int(class_ids.min()) and int(class_ids.max()) < classes):
        found = sorted(set(class_ids.tolist()))
        raise ValueError(f"class_ids {found[:8]}: the model has classes 0..{classes - 1}")


def count_images(rows: int | None, *given: Tensor | None) -> int:
    """B: `rows`, or the most rows of what is given. Raises ValueError for none."""
    images = max([rows or 0, *(len(x) for x in given if x is not None)])
    if not images:
        raise ValueError("nothing to generate from: give class_ids, encoder_hidden_states or rows")
    return images


def all_masks(
    model: Any, images: int, length: int | None = None, grid: tuple[int, int] | None = None
) -> Tensor:
    """The start of decoding: mask ids (B, N), N being the length, the grid's or the model's."""
    length = length or (math.prod(grid) if grid else 0)
    shape = (images, length or getattr(model.config, "num_vq_tokens", PUBLISHED_LENGTH))
    return torch.full(shape, model.mask_token_id, device=next(model.parameters()).device)
