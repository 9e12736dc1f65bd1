"""Step 8: codes from a condition, by parallel decoding (MaskGIT, Chang et al. 2022, section 3.2).

Start from all masks; at every decoding step predict all codes, keep the most confident, mask the
rest again, fewer each time by the mask schedule. B images, N codes, K codebook size, V outputs.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from train_stage.mask_schedule import Schedule, get_mask_schedule

TemperatureDecay = Literal["linear", "cumulative"]
TINY = 1e-20


@torch.no_grad()
def generate(
    model: Any,
    class_ids: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    negative_embeds: Tensor | None = None,
    input_ids: Tensor | None = None,
    temperature: float = 1.0,
    timesteps: int = 18,
    guidance_scale: float = 0.0,
    noise_schedule: str | Schedule = "cosine",
    temperature_decay: TemperatureDecay = "linear",
    rows: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Codes (B, N) int64 in [0, K) from a MaskGitTransformer.

    class_ids (B,) or encoder_hidden_states (B, S, width) say what; input_ids (B, N) with mask ids
    marks what to fill in (in-painting), the rest is kept; without any of them, `rows` images are
    drawn without condition. guidance_scale g > 0 samples from
    u + g (c - u), u being the logits without condition: the mask id in the class position, or
    negative_embeds (zeros when not given). temperature scales the Gumbel noise on the confidence;
    at ratio r of the steps it is temperature * (1 - r), or, "cumulative", the running product of
    (1 - r) that the reference computes. The generator lives on the model's device or on the CPU.
    Raises ValueError when nothing says how many images, for class ids the model does not have,
    and for an unknown schedule or decay.
    """
    if temperature_decay not in get_args(TemperatureDecay):
        raise ValueError(f"temperature_decay={temperature_decay!r}: linear or cumulative")
    check_classes(model, class_ids)
    schedule, size = as_schedule(noise_schedule), model.config.codebook_size
    mask_id, length = model.mask_token_id, model.config.num_vq_tokens
    if class_ids is None and encoder_hidden_states is None:
        guidance_scale = 0.0  # nothing to guide towards
    if input_ids is None:
        input_ids = all_masks(model, class_ids, encoder_hidden_states, rows)
    codes, running = input_ids, 1.0
    for step in range(timesteps):
        logits = guided_logits(
            model, input_ids, class_ids, encoder_hidden_states, negative_embeds, guidance_scale
        )
        probabilities = logits[..., :size].float().softmax(-1)  # (B, N, K)
        hidden = input_ids == mask_id
        codes = torch.where(hidden, sample_codes(probabilities, generator), input_ids)
        if step == timesteps - 1:
            break
        ratio = (step + 1) / timesteps
        running = running * (1.0 - ratio) if temperature_decay == "cumulative" else 1.0 - ratio
        left = int((length * schedule(torch.tensor(ratio))).floor())
        confidence = chosen_probabilities(probabilities, codes, hidden)
        mask_len = (hidden.sum(-1, keepdim=True) - 1).clamp(max=left).clamp(min=1)  # (B, 1)
        again = mask_by_random_topk(mask_len, confidence, temperature * running, generator)
        input_ids = torch.where(again, mask_id, codes)
    return codes


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
    every position gets a new score.
    """
    check_classes(model, class_ids)
    schedule, config, mask_id = as_schedule(noise_schedule), model.config, model.mask_token_id
    ids = all_masks(model, class_ids, encoder_hidden_states, None)
    scores = torch.zeros(ids.shape, device=ids.device)
    for step, t in enumerate(torch.linspace(0, 1, timesteps)):
        count = max(int((schedule(t) * config.num_vq_tokens).item()), 1)
        ids = ids.scatter(1, scores.topk(count, dim=-1).indices, mask_id)
        guidance = guidance_scale if encoder_hidden_states is not None else 0.0
        logits = guided_logits(model, ids, class_ids, encoder_hidden_states, None, guidance)
        logits = logits[..., : config.codebook_size]
        cooled = temperature * (timesteps - 1 - step) / timesteps
        draw = gumbel_sample(top_k(logits, topk_filter_thres), cooled, generator=generator)
        ids = torch.where(ids == mask_id, draw, ids)
        scores = 1 - logits.softmax(-1).gather(-1, draw.unsqueeze(-1)).squeeze(-1)
    return ids


def guided_logits(
    model: Any,
    input_ids: Tensor,
    class_ids: Tensor | None,
    text: Tensor | None,
    negative_text: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """Logits (B, N, V) of the code positions, with classifier-free guidance when asked for."""
    ids = input_ids
    if class_ids is not None:
        ids = torch.cat([(class_ids + model.config.codebook_size).unsqueeze(-1), ids], -1)
    if guidance_scale > 0:
        nothing = ids
        if class_ids is not None:
            nothing = ids.index_fill(
                1, torch.zeros(1, dtype=torch.long, device=ids.device), model.mask_token_id
            )
        ids = torch.cat([ids, nothing])
        if text is not None:
            negative = torch.zeros_like(text) if negative_text is None else negative_text
            text = torch.cat([text, negative.expand_as(text)])
    logits = model(ids) if text is None else model(ids, encoder_hidden_states=text)
    if class_ids is not None:
        logits = logits[:, 1:]
    if guidance_scale > 0:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + guidance_scale * (conditional - unconditional)
    return logits


def chosen_probabilities(probabilities: Tensor, codes: Tensor, hidden: Tensor) -> Tensor:
    """The probability of each chosen code, infinite where it was known before: (B, N)."""
    last = probabilities.shape[-1] - 1
    chosen = probabilities.gather(-1, codes.clamp(max=last).unsqueeze(-1)).squeeze(-1)
    return torch.where(hidden, chosen, torch.inf)


def as_schedule(schedule: str | Schedule) -> Schedule:
    """A schedule by name, or as it is."""
    return get_mask_schedule(schedule) if isinstance(schedule, str) else schedule


def sample_codes(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One draw a position: (B, N, K) -> (B, N) int64."""
    flat = probabilities.flatten(0, 1)
    if generator is not None and generator.device != flat.device:
        flat = flat.to(generator.device)
    draw = torch.multinomial(flat, 1, generator=generator)
    return draw.view(probabilities.shape[:2]).to(probabilities.device)


def mask_by_random_topk(
    mask_len: Tensor,
    probabilities: Tensor,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which codes to mask again: (B, N) bool, mask_len (B, 1) of them in each row.

    The least confident ones by log-probability plus temperature-scaled Gumbel noise.
    """
    noise = gumbel_noise(probabilities, generator)
    confidence = probabilities.clamp(min=TINY).log() + temperature * noise
    cut = confidence.sort(-1).values.gather(-1, mask_len.long())
    return confidence < cut


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the shape and device of `like`."""
    device = generator.device if generator is not None else like.device
    u = torch.zeros(like.shape, dtype=like.dtype, device=device).uniform_(0, 1, generator=generator)
    u = u.to(like.device)
    return -(-u.clamp(min=TINY).log()).clamp(min=TINY).log()


def gumbel_sample(
    logits: Tensor,
    temperature: float = 1.0,
    dim: int = -1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Arg-max of logits / temperature + Gumbel noise; temperature 0 is the plain arg-max."""
    return (logits / max(temperature, 1e-10) + gumbel_noise(logits, generator)).argmax(dim)


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keeps the ceil((1 - thres) V) largest of the last axis, the rest becomes -inf."""
    count = int(-(-((1 - thres) * logits.shape[-1]) // 1))
    values, places = logits.topk(count, dim=-1)
    return torch.full_like(logits, float("-inf")).scatter(-1, places, values)


def check_classes(model: Any, class_ids: Tensor | None) -> None:
    """Refuses class ids that the model does not have."""
    if class_ids is None or not len(class_ids):
        return
    classes = model.config.num_classes
    if not classes:
        raise ValueError("class_ids given, but the model has no classes (num_classes is null)")
    if not (0 <= int(class_ids.min()) and int(class_ids.max()) < classes):
        found = sorted(set(class_ids.tolist()))
        raise ValueError(f"class_ids {found[:8]}: the model has classes 0..{classes - 1}")


def all_masks(
    model: Any, class_ids: Tensor | None, text: Tensor | None, rows: int | None
) -> Tensor:
    """The start of decoding, one row of mask ids an image: (B, N)."""
    given = class_ids if class_ids is not None else text
    if given is not None:
        rows, device = len(given), given.device
    elif rows is not None:
        device = next(model.parameters()).device
    else:
        raise ValueError("nothing to generate from: give class_ids, encoder_hidden_states or rows")
    return torch.full((rows, model.config.num_vq_tokens), model.mask_token_id, device=device)
