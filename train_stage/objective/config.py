"""mask_schedule.*, and those of training.* that say what is predicted (steps 6 and 7)."""

from dataclasses import dataclass, field
from typing import Literal

from configs.load import ConfigError, check_range


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
    """Probability that a step hides one rectangle in each image instead of scattered codes."""
    stratified_mask_ratios: bool = False
    """Spread the mask ratios of a global batch evenly over the schedule: less noise in the loss."""
    noise_type: Literal["mask", "random_replace"] = "mask"
    """What stands where a code is hidden: the mask, or a random code (all codes are predicted)."""
    predict_all_tokens: bool = False
    """Predict visible codes too, with a weight that rises with the mask ratio from 0.3 to 1."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    soft_targets: Literal["stored", "recomputed"] | None = None
    """Predict the nearest codes, not one: stored are those of the image's own latents (the columns
    topk_codes and topk_weights), recomputed those near the code, whatever the latent was."""
    soft_code_temp: float = 1.0
    """Temperature of recomputed soft targets: softmax(-squared distance / temperature)."""
    soft_target_codes: int = 16
    """How many codes a recomputed soft target has."""
    use_stochastic_code: bool = False
    """Draw the codes of every step from the stored soft targets; needs soft_targets=stored."""
    cond_dropout_prob: float = 0.1
    """Probability of *dropping* the condition, so that guidance works when sampling."""
    self_conditioning_prob: float = 0.5
    """Share of the steps that see an earlier prediction of their own; for models with
    model.transformer.self_conditioning."""
    critic: Literal["self", "token"] | None = None
    """Learn which codes are the image's own and which a model's: self beside predicting them, of
    what the model itself samples; token nothing else, of what critic_generator samples. Needs
    model.transformer.critic_head."""
    critic_weight: float = 1.0
    """Weight of the self-critic's loss beside the cross-entropy."""
    critic_generator: str | None = None
    """Folder or hub name of the frozen model whose codes the token-critic judges."""
    log_entropy_every: int = 0
    """Steps between entropies of the predictions in the log, by mask ratio; 0 for none."""

    def __post_init__(self) -> None:
        for name in (
            "label_smoothing",
            "cond_dropout_prob",
            "min_masking_rate",
            "self_conditioning_prob",
        ):
            check_range(f"training.{name}", getattr(self, name), 0, 1)
        if self.mask_contiguous_region_prob is not None:
            name = "mask_contiguous_region_prob"
            check_range(f"training.{name}", self.mask_contiguous_region_prob, 0, 1)
        check_range("training.soft_target_codes", self.soft_target_codes, 1)
        check_range("training.critic_weight", self.critic_weight, 0)
        check_range("training.log_entropy_every", self.log_entropy_every, 0)
        if self.soft_code_temp <= 0:
            raise ConfigError(f"training.soft_code_temp={self.soft_code_temp}: must be above 0")
        if self.use_stochastic_code and self.soft_targets != "stored":
            raise ConfigError(
                "training.use_stochastic_code=true draws from stored soft targets: give "
                "training.soft_targets=stored"
            )
        if (self.critic == "token") != (self.critic_generator is not None):
            raise ConfigError(
                f"training.critic={self.critic or 'null'}, training.critic_generator="
                f"{self.critic_generator or 'null'}: critic=token and a generator go together"
            )

    @property
    def predicts_all(self) -> bool:
        """Visible codes are scored, too: what is not hidden behind a mask may be wrong."""
        return self.predict_all_tokens or self.noise_type == "random_replace"
