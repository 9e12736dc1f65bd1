"""How long the steps since the last log line took, and what of it was waiting for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Images and seconds since the last log line, pauses left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts a new window now."""
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began
