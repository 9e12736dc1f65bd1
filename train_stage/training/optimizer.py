"""The optimizer of a run: its name, and which weights are decayed."""

from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Adafactor, AdamW, Optimizer

from train_stage.training.lion import Lion
from train_stage.training.muon import MuonAdamW

OptimizerName = Literal["adamw", "fused_adamw", "8bit_adamw", "lion", "adafactor", "muon"]
Groups = list[dict[str, Any]]
NO_DECAY = ("bias", "gamma", "beta", "null_text", "null_pooled")  # ends of names


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
) -> Optimizer:
    """The optimizer called `name` (OptimizerName) over the model's trainable parameters.

    Biases, norms and embeddings are not decayed. adafactor takes neither betas nor epsilon.
    Raises ValueError for another name, and for 8bit_adamw without bitsandbytes.
    """
    if name not in get_args(OptimizerName):
        raise ValueError(f"optimizer.name={name}: legal are {', '.join(get_args(OptimizerName))}")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: Groups = [
        {"params": [p for n, p in named if not no_decay(n)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if no_decay(n)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match name:
        case "8bit_adamw":
            return adamw_8bit()(groups, lr=learning_rate, betas=betas, eps=epsilon)
        case "lion":
            return Lion(groups, lr=learning_rate, betas=betas)
        case "adafactor":
            return Adafactor(groups, lr=learning_rate)
        case "muon":
            return MuonAdamW(groups, learning_rate, betas, epsilon)
    fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
    return AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)


def adamw_8bit() -> Callable[..., Optimizer]:
    """The class of bitsandbytes (Dettmers et al. 2022)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError(
            "optimizer.name=8bit_adamw needs bitsandbytes: pip install 'open-muse[8bit]'"
        ) from None
    return AdamW8bit


def no_decay(name: str) -> bool:
    """True for parameters without weight decay: biases, norms, embeddings, learned conditions.

    The reference decays `norm.norm.weight` and its like by omission; here no norm is decayed.
    """
    *owners, last = name.split(".")
    owner = owners[-1] if owners else ""
    is_table = owner.endswith(("norm", "mlm_ln", "embeddings")) and last == "weight"
    return last in NO_DECAY or is_table
