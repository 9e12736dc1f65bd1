"""What processes must know alike: what one of them wants, and what the main one has decided."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from train_stage.training.run_token import Replaced

Answer = TypeVar("Answer")


class Agreement:
    """The largest number that any process says, asked once a step without making a GPU wait.

    With several processes the answer is that of the step before: it has arrived by then.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._before: tuple[Tensor, torch.cuda.Event | None] | None = None

    def largest(self, number: int) -> int:
        """A collective call."""
        if self.accelerator.num_processes == 1:
            return number
        flag = torch.tensor(number, device=self.accelerator.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        event = torch.cuda.Event() if flag.is_cuda else None
        before, self._before = self._before, (flag.to("cpu", non_blocking=True), event)
        if event is not None:
            event.record()
        if before is None:
            return 0
        answer, arrived = before
        if arrived is not None:
            arrived.synchronize()
        return int(answer)


def largest(number: int) -> int:
    """The largest number that any process says; a collective call."""
    state = PartialState()
    if state.num_processes == 1:
        return number
    flag = torch.tensor(int(number), device=state.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return int(flag)


def decide(function: Callable[[], Answer]) -> Answer:
    """What `function` returns or raises on the main process, on all processes; collective."""
    found: list[Any] = [None, None]  # answer, error
    if PartialState().is_main_process:
        try:
            found[0] = function()
        except (ValueError, OSError, Replaced) as problem:
            found[1] = problem
    if PartialState().num_processes > 1:
        broadcast_object_list(found)
    answer, error = found
    if error is not None:
        raise error
    return answer
