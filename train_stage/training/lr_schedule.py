"""Learning-rate schedules: a pure function of the step, so that there is nothing to save."""

import math
from typing import Literal, get_args

POLYNOMIAL_END = 1e-7  # learning rate after a polynomial decay
SchedulerName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "warmup_stable_decay",
]


def lr_factor(
    name: str,
    step: int,
    warmup_steps: int,
    total_steps: int,
    num_cycles: int = 1,
    power: float = 1.0,
    learning_rate: float = 1.0,
    decay_steps: int | None = None,
) -> float:
    """What the learning rate is multiplied by at `step` (from 0), after Hugging Face's schedules.

    warmup_stable_decay: constant, then 1 - sqrt(x) over the last decay_steps (Hägele et al. 2024),
    a fifth of all steps when not given. Raises ValueError for a name not in SchedulerName.
    """
    if name not in get_args(SchedulerName):
        legal = ", ".join(get_args(SchedulerName))
        raise ValueError(f"lr_scheduler.scheduler={name}: legal are {legal}")
    if name == "constant":
        return 1.0
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match name:
        case "constant_with_warmup":
            return 1.0
        case "warmup_stable_decay":
            decay_steps = total_steps // 5 if decay_steps is None else decay_steps
            left = (total_steps - step) / max(1, decay_steps)
            return 1.0 - math.sqrt(min(1.0, max(0.0, 1.0 - left)))
        case "linear":
            return max(0.0, 1.0 - done)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "cosine_with_restarts":
            turn = math.cos(math.pi * ((num_cycles * done) % 1.0))
            return 0.0 if done >= 1 else 0.5 * (1.0 + turn)
    if step > total_steps:
        return POLYNOMIAL_END / learning_rate
    decayed = (learning_rate - POLYNOMIAL_END) * (1.0 - done) ** power + POLYNOMIAL_END
    return decayed / learning_rate
