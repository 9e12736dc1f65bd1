"""mask_schedule.*, and those of training.* that say what is predicted (steps 6 and 7)."""

from dataclasses import dataclass, field

from configs.load import check_range


@dataclass
class MaskScheduleConfig:
    schedule: str = "cosine"
    """cosine, linear, arccos, square, sqrt, sigmoid, or pow and a number (pow3)."""
    params: dict[str, float] = field(default_factory=dict)
    """For sigmoid: start, end, tau, clip_min."""


@dataclass
class ObjectiveFields:
    """The part of training.* that says what is predicted."""

    min_masking_rate: float = 0.0
    """Smallest mask ratio."""
    mask_contiguous_region_prob: float | None = None
    """Probability of hiding one rectangle instead of scattered codes."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    cond_dropout_prob: float = 0.1
    """Probability of *dropping* the condition, so that guidance works when sampling."""

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "cond_dropout_prob", "min_masking_rate"):
            check_range(f"training.{name}", getattr(self, name), 0, 1)
