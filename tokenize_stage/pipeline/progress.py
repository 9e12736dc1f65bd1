"""What the user sees while images are encoded: a progress bar, and where the time goes."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
PHASES = ("decode", "encode", "write")


class Progress:
    """Counts rows, rejected samples by kind, and the main thread's seconds in each phase.

    "decode" is the time the encoder waits for decoded images, not the work of the threads.
    """

    def __init__(self, shards: int, rows_per_shard: float | None):
        """rows_per_shard: known or measured before, for the first estimate of the time left."""
        self.rows, self.skipped = 0, Counter[str]()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.started = time.monotonic()
        self._shards, self._shards_done = shards, 0
        total = rows_per_shard and int(rows_per_shard * shards)
        slow = not sys.stderr.isatty()  # a log file gets a line every 30 s, a terminal ten a second
        self._bar = tqdm(
            total=total, desc="tokenize", unit=" images", mininterval=30 if slow else 0.1
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the seconds of a `with` block as those of a phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - start

    def waiting(self, items: Iterator[T]) -> T:
        """The next item; the time until it comes counts as decoding."""
        with self.phase("decode"):
            return next(items)

    def add_rows(self, count: int) -> None:
        self.rows += count
        shares = {name: f"{share:.0%}" for name, share in self.shares().items()}
        self._bar.set_postfix(shares, refresh=False)
        self._bar.update(count)

    def add_skipped(self, reason: str) -> None:
        self.skipped[reason.split(":", 1)[0]] += 1

    def shard_done(self) -> None:
        """Sharpens the estimate of the total, and with it the time left."""
        self._shards_done += 1
        self._bar.total = round(self.rows / self._shards_done * self._shards)

    def shares(self) -> dict[str, float]:
        """The share of each phase in the time spent so far."""
        spent = sum(self.seconds.values()) or 1.0
        return {name: seconds / spent for name, seconds in self.seconds.items()}

    def images_per_s(self) -> float:
        return self.rows / max(time.monotonic() - self.started, 1e-9)

    def close(self) -> None:
        self._bar.close()
