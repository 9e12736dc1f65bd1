"""Exponential moving average of the weights; state and schedule are saved and resumed exactly."""

from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Shadow weights s += (1 - decay) (w - s), decay warmed up over the updates.

    decay at update s (after update_after_step): min(decay, (1 + s) / (10 + s)), or with
    use_ema_warmup min(decay, 1 - (1 + s / inv_gamma) ** -power); at least min_decay. Every
    update_every-th call counts. Weights without gradient are copied; buffers are not tracked.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        update_every: int = 1,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
    ):
        self.decay, self.min_decay = decay, min_decay
        self.update_after_step, self.update_every = update_after_step, update_every
        self.use_ema_warmup, self.inv_gamma, self.power = use_ema_warmup, inv_gamma, power
        self.optimization_step = 0
        self.last_decay = 0.0
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._stored: dict[str, Tensor] = {}

    def decay_at(self, optimization_step: int) -> float:
        """The decay used in the call of this number (from 1)."""
        step = max(0, optimization_step - self.update_after_step - 1)
        if step == 0:
            return 0.0
        if self.use_ema_warmup:
            value = 1 - (1 + step / self.inv_gamma) ** -self.power
        else:
            value = (1 + step) / (10 + step)
        return max(min(value, self.decay), self.min_decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the shadow towards the model; call once after every optimizer step."""
        self.optimization_step += 1
        if (self.optimization_step - 1) % self.update_every:
            return
        self.last_decay = self.decay_at(self.optimization_step)
        pairs = [(self.shadow[name], p.detach()) for name, p in model.named_parameters()]
        learned = [p.requires_grad for p in model.parameters()]
        for is_learned, weight in ((True, 1 - self.last_decay), (False, 1.0)):
            chosen = [pair for pair, flag in zip(pairs, learned, strict=True) if flag == is_learned]
            if chosen:  # all of them in a few kernels on a GPU
                shadows, weights = zip(*chosen, strict=True)
                torch._foreach_lerp_(shadows, weights, weight)

    @torch.no_grad()
    def swap_in(self, model: nn.Module) -> None:
        """Puts the shadow into the model until swap_out."""
        self._stored = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.copy_(self.shadow[name])

    @torch.no_grad()
    def swap_out(self, model: nn.Module) -> None:
        """Puts the trained weights back."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self._stored[name])
        self._stored = {}

    def counters(self) -> dict[str, Any]:
        """What resume needs beside the shadow."""
        return {"optimization_step": self.optimization_step, "last_decay": self.last_decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores counters() and "shadow", a tensor a name; the shadow stays on its device."""
        for name, shadow in self.shadow.items():
            shadow.copy_(state["shadow"][name])
        self.optimization_step = state["optimization_step"]
        self.last_decay = state["last_decay"]
