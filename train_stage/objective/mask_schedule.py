"""Mask schedules γ: [0, 1] -> mask ratio, one set for training and for sampling.

In training t is uniform; in sampling t is the share of decoding steps done. MUSE's arccos
*density* of mask ratios is what "cosine" gives under uniform t (r = cos(πt/2)); "arccos" is the
schedule of that name in MaskGIT's ablation, γ(t) = 2 arccos(t) / π.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]
SMALLEST = 1e-6  # ratios below this count as this


def cosine_schedule(t: Tensor) -> Tensor:
    """cos(πt/2); not clamped, about -4e-8 at t = 1 in float32."""
    return torch.cos(t * math.pi * 0.5)


def linear_schedule(t: Tensor) -> Tensor:
    """1 - t."""
    return (1.0 - t).clamp(SMALLEST, 1.0)


def arccos_schedule(t: Tensor) -> Tensor:
    """2 arccos(t) / π."""
    return (torch.acos(t.clamp(0.0, 1.0)) * (2.0 / math.pi)).clamp(SMALLEST, 1.0)


def pow_schedule(t: Tensor, exponent: float) -> Tensor:
    """1 - t^exponent: convex below exponent 1, concave above."""
    return (1.0 - t**exponent).clamp(SMALLEST, 1.0)


def sigmoid_schedule(
    t: Tensor, start: float = -3.0, end: float = 3.0, tau: float = 1.0, clip_min: float = SMALLEST
) -> Tensor:
    """A falling sigmoid between `start` and `end`, scaled to reach 1 at 0 and 0 at 1."""
    first, last = (torch.sigmoid(torch.tensor(edge / tau)) for edge in (start, end))
    value = torch.sigmoid((t * (end - start) + start) / tau)
    return ((last - value) / (last - first)).clamp(clip_min, 1.0)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "cosine": cosine_schedule,
    "linear": linear_schedule,
    "arccos": arccos_schedule,
    "square": lambda t: pow_schedule(t, 2.0),
    "sqrt": lambda t: pow_schedule(t, 0.5),
    "sigmoid": sigmoid_schedule,
}


def get_mask_schedule(name: str, **params: float) -> Schedule:
    """The schedule called `name`: one of SCHEDULES, or "pow" and a number ("pow3", "pow0.5").

    params go to the schedule (sigmoid: start, end, tau, clip_min). Raises ValueError otherwise.
    """
    if name.startswith("pow") and not params:
        try:
            exponent = float(name.removeprefix("pow"))
        except ValueError:
            raise ValueError(
                f"mask schedule {name!r}: write pow and a number, as in pow3"
            ) from None
        return lambda t: pow_schedule(t, exponent)
    if name not in SCHEDULES:
        raise ValueError(f"mask schedule {name!r}: legal are {', '.join(SCHEDULES)}, pow<number>")
    schedule = SCHEDULES[name]
    try:
        inspect.signature(schedule).bind(None, **params)
    except TypeError as error:
        raise ValueError(f"mask schedule {name}, params {params}: {error}") from None
    return lambda t: schedule(t, **params)
