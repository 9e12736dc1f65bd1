"""Muon for matrices and AdamW for the rest, as one optimizer (Jordan et al. 2024)."""

from collections.abc import Callable
from typing import Any

from torch.optim import AdamW, Muon, Optimizer


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
        is_matrix = [p.ndim == 2 and min(p.shape) > 1 for p in groups[0]["params"]]
        pairs = list(zip(groups[0]["params"], is_matrix, strict=True))
        matrices = [p for p, flag in pairs if flag]
        others = [p for p, flag in pairs if not flag]
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
