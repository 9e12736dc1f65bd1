"""SIGTERM and SIGUSR1 ask a run to save and stop: the handler sets a flag, the loop looks at it.

Slurm sends these before preemption and time limits; both may come twice and to some ranks only.
"""

import signal
from types import FrameType

import torch
from accelerate import Accelerator

EXIT_REFUSED = 2
EXIT_SAVED = 75  # "saved, not finished": run the same command again (EX_TEMPFAIL)


class StopFlag:
    """Set by a signal; `agreed` is the same on all processes."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received = accelerator, 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def agreed(self) -> int:
        """The number of the signal received by any process, 0 for none; a collective call."""
        if self.accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor([self.received], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
