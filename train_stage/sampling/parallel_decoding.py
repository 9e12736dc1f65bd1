"""Step 8's loop: parallel decoding (MaskGIT, Chang et al. 2022, section 3.2), without a model.

Predict the hidden codes, settle the most confident, hide the rest again, fewer each time. `predict`
(guidance.py) knows the model and its condition; the loop knows masks, schedules and draws. Its
numbers are planned on the host, so that inside it nothing waits for the device.
B images, N codes, K codebook size, T steps, L positions that may be hidden, of any image.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from train_stage.objective.mask_schedule import Schedule

Predict = Callable[..., Tensor]
"""input_ids (B, N), positions (B, L), step[, previous (B, N)] -> logits (B, L, K) of positions."""
Judge = Callable[[Tensor], Tensor]
"""codes (B, N) -> odds (B, N) in [0, inf] that each is the image's own, and was not drawn."""
Compiler = Callable[[Callable], Callable]
TemperatureDecay = Literal["linear", "cumulative", "linspace"]
TINY = 1e-20
COLDEST = 0.01  # where "linspace" ends


def hidden_counts(
    schedule: Schedule, timesteps: int, length: int, starting_mask_ratio: float = 1.0
) -> list[int]:
    """How many of `length` codes are hidden after each step, at most: T numbers.

    starting_mask_ratio scales the schedule where fewer than all are hidden at the start.
    """
    ratios = [schedule(torch.tensor(step / timesteps)) for step in range(1, timesteps + 1)]
    return [int((length * (starting_mask_ratio * ratio)).floor()) for ratio in ratios]


def step_temperatures(
    temperature: float | Sequence[float], timesteps: int, decay: TemperatureDecay
) -> list[float]:
    """The scale of the confidence's noise at each step: T numbers.

    From the first to the second of two temperatures, both included; from one by `decay`: "linear"
    t (1 - r) as in MaskGIT, r = 1/T … 1; "cumulative", the running product of (1 - r) that
    openMUSE's MaskGitTransformer computes; "linspace", t … 0.01 as its U-ViT and diffusers.
    """
    if decay not in get_args(TemperatureDecay):
        legal = ", ".join(get_args(TemperatureDecay))
        raise ValueError(f"temperature_decay={decay!r}: legal are {legal}")
    if not isinstance(temperature, int | float):
        first, last = temperature
        return torch.linspace(first, last, timesteps).tolist()
    if decay == "linspace":
        return torch.linspace(temperature, COLDEST, timesteps).tolist()
    left = [1.0 - step / timesteps for step in range(1, timesteps + 1)]
    if decay == "cumulative":
        for step in range(1, timesteps):
            left[step] *= left[step - 1]
    return [temperature * share for share in left]


def decode(
    predict: Predict,
    input_ids: Tensor,
    mask_id: int,
    counts: Sequence[int],
    temperatures: Sequence[float],
    first_step: int = 0,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    draws: list[Tensor] | None = None,
    compiler: Compiler | None = None,
    judge: Judge | None = None,
    is_self_conditioned: bool = False,
) -> Tensor:
    """Codes (B, N): what input_ids (B, N) hides is filled in, the rest stays.

    counts, temperatures: hidden_counts, step_temperatures. first_step > 0 begins in the middle.
    callback(step, input_ids) sees what each step leaves. draws, a list, gets each step's draws for
    all positions (B, N), which then are all predicted. compiler: what compiles the functions that
    end a step, as torch.compile. judge: its odds take the place of the codes' probabilities, and
    what is settled may be hidden again. is_self_conditioned: the most probable codes of a step are
    `previous` of the next, where they are hidden still, as in training. Raises ValueError where the
    model predicts NaN.
    """
    if not 0 <= first_step < len(counts):
        raise ValueError(f"first_step={first_step} of {len(counts)} decoding steps")
    settle = compiler(settle_codes) if compiler else settle_codes
    hide = compiler(hide_again) if compiler else hide_again
    count, cooled = (torch.tensor(x, device=input_ids.device) for x in (counts, temperatures))
    broken = torch.zeros((), dtype=torch.bool, device=input_ids.device)
    hidden = unknown = input_ids == mask_id
    likely = torch.full_like(input_ids, mask_id)
    given = (likely,) if is_self_conditioned else ()
    length = max(int(hidden.sum(-1).max()), 1)  # a sync, before the first step
    for step in range(first_step, len(counts)):
        positions = hidden_positions(hidden, length if draws is None else hidden.shape[1])
        logits = predict(input_ids, positions, step, *given)
        noise = exponential_noise((*hidden.shape, logits.shape[-1]), logits.device, generator)
        codes, drawn, chosen = settle(input_ids, hidden, positions, logits, take(noise, positions))
        if draws is not None:
            draws.append(torch.empty_like(codes).scatter(1, positions, drawn))
        input_ids = codes
        if step < len(counts) - 1:
            if judge is not None:
                chosen = torch.where(unknown, judge(codes), torch.inf)
            uniform = uniform_noise(hidden.shape, codes.device, generator)
            again = hide(hidden, chosen, uniform, count[step], cooled[step])
            if is_self_conditioned:
                likely = fill(likely, hidden, positions, logits.argmax(-1))
                given = (torch.where(again, likely, mask_id),)
            hidden, input_ids = again, torch.where(again, mask_id, codes)
            length = max(min(length - 1, counts[step]), 1)
        broken = broken | chosen.isnan().any()
        if callback is not None:
            callback(step, input_ids)
    if broken:  # a sync, after the last step
        raise ValueError("the model predicts NaN: check its weights, or decode in float32")
    return input_ids


def hidden_positions(hidden: Tensor, length: int) -> Tensor:
    """(B, N) bool -> (B, length): where it is true, in order, then other places."""
    return hidden.int().argsort(dim=-1, descending=True, stable=True)[:, :length]


def take(x: Tensor, positions: Tensor) -> Tensor:
    """(B, N, …), (B, L) -> (B, L, …): the rows of each image at its positions."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), positions]


def fill(x: Tensor, hidden: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """x (B, N) with values (B, L) at those of the positions (B, L) that are hidden (B, N) bool."""
    return torch.where(hidden, x.scatter(1, positions, values), x)


def settle_codes(
    input_ids: Tensor, hidden: Tensor, positions: Tensor, logits: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a code at each position: all codes (B, N), the draws (B, L), probabilities (B, N).

    With exponential noise (B, L, K) the arg-max of p / noise is a draw from p, and the very one
    that torch.multinomial makes. Codes that were known have the probability inf.
    """
    probabilities = logits.float().softmax(-1)
    drawn = (probabilities / noise).argmax(-1)
    chosen = probabilities.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    known = torch.full(hidden.shape, torch.inf, device=chosen.device)
    codes = fill(input_ids, hidden, positions, drawn)
    return codes, drawn, fill(known, hidden, positions, chosen)


def hide_again(
    hidden: Tensor, chosen: Tensor, uniform: Tensor, count: Tensor, temperature: Tensor
) -> Tensor:
    """The least confident codes, (B, N) bool: `count`, but one fewer than are `hidden` (B, N).

    chosen (B, N): the codes' probabilities, inf for what stays; uniform (B, N) in [0, 1).
    """
    mask_len = (hidden.sum(-1, keepdim=True) - 1).minimum(count).clamp(min=1)  # (B, 1)
    return least_confident(mask_len, chosen, temperature * gumbel(uniform))


def least_confident(mask_len: Tensor, probabilities: Tensor, noise: Tensor | float) -> Tensor:
    """Where log-probability + noise is among the mask_len (B, 1) least of its row: (B, N) bool."""
    confidence = probabilities.clamp(min=TINY).log() + noise
    cut = confidence.sort(-1).values.gather(-1, mask_len)
    return confidence < cut


def gumbel(uniform: Tensor) -> Tensor:
    """Uniform numbers as standard Gumbel noise."""
    return -(-uniform.clamp(min=TINY).log()).clamp(min=TINY).log()


def uniform_noise(
    shape: Sequence[int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Uniform float32 in [0, 1), drawn where the generator lives, one draw for the whole shape."""
    source = device if generator is None else generator.device
    return torch.empty(shape, device=source).uniform_(generator=generator).to(device)


def exponential_noise(
    shape: Sequence[int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Exponential float32 of rate 1, drawn like uniform_noise."""
    source = device if generator is None else generator.device
    return torch.empty(shape, device=source).exponential_(generator=generator).to(device)
