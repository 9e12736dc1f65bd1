"""Optimizers whose update of a weight needs all of it, where weights are sharded.

Adafactor's means over rows and columns and Muon's orthogonal updates are of whole matrices. One
weight after the other is gathered, updated alike by every process, and sharded again; states of its
shape stay sharded. AdamW and Lion, which are pointwise, step the shards as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Adafactor, Muon, Optimizer


def see_whole_weights(optimizer: Optimizer) -> None:
    """Lets an Adafactor, and the Muon of a MuonAdamW, step sharded weights; others are left."""
    for part in getattr(optimizer, "parts", [optimizer]):
        if isinstance(part, Adafactor | Muon):
            part.step = partial(step_whole, part, part.step)  # type: ignore[method-assign]


@torch.no_grad()
def step_whole(optimizer: Optimizer, step: Callable[[], Any], closure: None = None) -> None:
    """`step` of the optimizer, for each sharded weight with a gradient; a collective call."""
    groups = optimizer.param_groups
    for group in groups:
        for weight in group["params"]:
            if weight.grad is None:
                continue
            whole = gathered(weight)
            whole.grad = gathered(weight.grad)
            state = optimizer.state.pop(weight, {})
            optimizer.state[whole] = {name: gathered(value) for name, value in state.items()}
            optimizer.param_groups = [{**group, "params": [whole]}]
            step()
            weight.copy_(sharded_as(weight, whole))
            state = optimizer.state.pop(whole)
            optimizer.state[weight] = {n: sharded_as(weight, value) for n, value in state.items()}
    optimizer.param_groups = groups


def gathered(value: Any) -> Any:
    """A DTensor as a whole tensor; anything else as it is."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def sharded_as(weight: DTensor, value: Any) -> Any:
    """A tensor of the weight's shape, alike on all processes, as its shards; others as they are."""
    if not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
