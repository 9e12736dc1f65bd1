"""Optimizers and learning-rate schedules; the schedule is a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

POLYNOMIAL_END = 1e-7  # learning rate after a polynomial decay


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
) -> Optimizer:
    """AdamW (fused where torch has it), Lion or Muon over the model's trainable parameters.

    Vectors (norm weights, biases) and embeddings are not decayed.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if not no_decay(n)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if no_decay(n)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
        return AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)
    if name == "lion":
        return Lion(groups, lr=learning_rate, betas=betas)
    if name == "muon":
        return MuonAdamW(groups, learning_rate, betas, epsilon)
    raise ValueError(f"optimizer.name {name!r}: legal are adamw, lion, muon")


def no_decay(name: str) -> bool:
    """True for parameters without weight decay: biases, norm weights, embeddings.

    The reference decays `norm.norm.weight` and its like by omission; here no norm is decayed.
    """
    parts = name.split(".")
    if parts[-1] == "bias":
        return True
    owner = parts[-2] if len(parts) > 1 else ""
    return owner.endswith(("norm", "mlm_ln", "embeddings")) and parts[-1] == "weight"


class Lion(Optimizer):
    """Lion (Chen et al. 2023): p -= lr (sign(b1 m + (1 - b1) g) + wd p); m = b2 m + (1 - b2) g."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(momentum.lerp(p.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - beta2)
        return loss


class MuonAdamW(Optimizer):
    """torch's Muon (Jordan et al. 2024) for matrices that are decayed, its AdamW for the rest.

    Muon's updates are scaled to AdamW's usual size, so one learning rate serves both.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        epsilon: float,
    ):
        params = [p for group in groups for p in group["params"]]
        super().__init__(params, {"lr": lr})
        matrices = [p for p in groups[0]["params"] if p.ndim == 2]
        others = [p for p in groups[0]["params"] if p.ndim != 2]
        decay = groups[0]["weight_decay"]
        rest = [{"params": others, "weight_decay": decay}, *groups[1:]]
        scaled = "match_rms_adamw"
        self.parts = [
            Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn=scaled),
            AdamW([group for group in rest if group["params"]], lr=lr, betas=betas, eps=epsilon),
        ]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def lr_factor(
    name: str,
    step: int,
    warmup_steps: int,
    total_steps: int,
    num_cycles: int = 1,
    power: float = 1.0,
    learning_rate: float = 1.0,
) -> float:
    """What the learning rate is multiplied by at `step` (from 0), after Hugging Face's schedules.

    Raises ValueError for a name not in SCHEDULERS.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"lr_scheduler.scheduler {name!r}: legal are {', '.join(SCHEDULERS)}")
    if name == "constant":
        return 1.0
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if name == "constant_with_warmup":
        return 1.0
    if name == "linear":
        return max(0.0, 1.0 - done)
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if name == "cosine_with_restarts":
        return 0.0 if done >= 1 else 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * done) % 1.0)))
    if step > total_steps:
        return POLYNOMIAL_END / learning_rate
    decayed = (learning_rate - POLYNOMIAL_END) * (1.0 - done) ** power + POLYNOMIAL_END
    return decayed / learning_rate


SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
