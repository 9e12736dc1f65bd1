"""How long the steps since the last log line took, and what of it was waiting for data.

On a GPU the host runs ahead: waiting for the loader costs nothing while earlier steps still
compute. So the GPU itself keeps the time: two events, before and after the wait, lie as far apart
in its queue as it had nothing to do.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Images and seconds since the last log line, pauses left out."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.on_gpu = device is not None and device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Starts a new window now."""
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside is waiting for the loader; nothing inside may use the GPU."""
        began, before = time.perf_counter(), self._mark()
        yield
        self.waited += time.perf_counter() - began
        if before is not None and (after := self._mark()) is not None:
            self._waits.append((before, after))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def seconds(self) -> float:
        """How long the window has been, pauses left out."""
        return time.perf_counter() - self.started

    def stalled(self) -> float:
        """Seconds in which nothing was computed for want of data; a GPU's work must be done."""
        if not self.on_gpu:
            return self.waited
        return sum(before.elapsed_time(after) for before, after in self._waits) / 1000

    def _mark(self) -> "torch.cuda.Event | None":
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
