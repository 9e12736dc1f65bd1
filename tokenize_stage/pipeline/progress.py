"""What the user sees while images are encoded: a progress bar, and where the time goes."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
PHASES = ("decode", "device", "write")


class Progress:
    """Counts rows, rejected samples by kind, failed shards, and the seconds of each phase.

    "decode" is the time in which no decoded images were there to be encoded, "device" that of
    waiting for codes, "write" that of making and writing shards; they overlap.
    """

    def __init__(self, shards: int, rows: int | None):
        """rows: known before, for the first estimate of the time left."""
        self.rows, self.skipped = 0, Counter[str]()
        self.failed: dict[str, str] = {}  # input shard -> why it could not be read
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._started, self._ended = time.monotonic(), 0.0
        self._shards, self._shards_done, self._rows_done = shards, 0, 0
        slow = not sys.stderr.isatty()  # a log file gets a line every 30 s, a terminal ten a second
        self._bar = tqdm(
            total=rows, desc="tokenize", unit=" images", mininterval=30 if slow else 0.1
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the seconds of a `with` block as those of a phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - start

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        """The items; the time until each comes counts as decoding."""
        while True:
            with self.phase("decode"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def add_rows(self, count: int) -> None:
        self.rows += count
        shares = {name: f"{share:.0%}" for name, share in self.shares().items()}
        self._bar.set_postfix(shares, refresh=False)
        self._bar.update(count)

    def add_skipped(self, reason: str) -> None:
        self.skipped[reason.split(":", 1)[0]] += 1

    def shard_done(self, rows: int) -> None:
        """Sharpens the estimate of the total, and with it the time left."""
        self._shards_done += 1
        self._rows_done += rows
        self._bar.total = round(self._rows_done / self._shards_done * self._shards)

    def shard_failed(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        self._shards -= 1

    def shares(self) -> dict[str, float]:
        """The share of each phase in the time passed so far."""
        return {name: seconds / self._passed_s() for name, seconds in self.seconds.items()}

    def rows_per_s(self) -> float:
        return self.rows / self._passed_s()

    def close(self) -> None:
        """Ends the bar and the time that rates are counted over."""
        self._ended = time.monotonic()
        self._bar.close()

    def _passed_s(self) -> float:
        return max((self._ended or time.monotonic()) - self._started, 1e-9)
