"""Where row number i lies: arithmetic between row numbers, shards, chunks and places in them.

Rows on disk count through the shards in order; row *numbers*, which are all that a user sees,
leave out the dropped ones. S shards, C chunks; everything is int64.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

Places = slice | np.ndarray
Piece = tuple[int, int, Places, Places]  # shard, chunk, places in the chunk, in the result


class RowNumbers:
    """Memory: a few numbers a shard, two a chunk once chunks are asked for, one a dropped row."""

    def __init__(self, disk_rows: np.ndarray, dropped: list[np.ndarray | None], chunk_rows: int):
        """disk_rows: (S,); dropped: per shard the dropped places, ascending, or None."""
        self.chunk_rows, self._dropped = chunk_rows, dropped
        self.disk_rows = np.asarray(disk_rows, np.int64)
        self.starts = _cumulative(self.disk_rows)  # (S + 1,) on disk
        parts = [places + self.starts[shard] for shard, places in _present(dropped)]
        self.dropped = np.concatenate([np.empty(0, np.int64), *parts])  # on disk, ascending
        self._dropped_before = self.dropped - np.arange(len(self.dropped))  # as row numbers
        self.bounds = self.starts - np.searchsorted(self.dropped, self.starts)  # (S + 1,)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def on_disk(self, numbers: np.ndarray) -> np.ndarray:
        """Row numbers -> places counted through all shards on disk."""
        if not len(self.dropped):
            return numbers
        return numbers + np.searchsorted(self._dropped_before, numbers, side="right")

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers -> (shard, place inside it on disk), both (n,)."""
        disk = self.on_disk(numbers)
        shard = self.shard_of(disk)
        return shard, disk - self.starts[shard]

    def shard_of(self, disk: np.ndarray) -> np.ndarray:
        """The shards (n,) of places on disk (n,)."""
        bits, first = self._shard_guess
        if not bits:
            return np.searchsorted(self.starts, disk, side="right") - 1
        shard = first.take(disk >> bits)  # a stretch of 2^bits rows lies in two shards at most
        shard += disk >= self.starts[1:].take(shard)
        return shard

    @cached_property
    def _shard_guess(self) -> tuple[int, np.ndarray]:
        """(bits, the shard of row k << bits for every k); bits 0 where shards are small."""
        bits = int(self.disk_rows.min(initial=2**32)).bit_length() - 1
        if bits < 6:
            return 0, np.empty(0, np.int64)
        stretches = np.arange(0, int(self.starts[-1]) or 1, 1 << bits)
        return bits, np.searchsorted(self.starts, stretches, side="right") - 1

    def dropped_in(self, shard: int) -> np.ndarray | None:
        """The dropped places of a shard, ascending; None when there are none."""
        return self._dropped[shard]

    def kept_in(self, shard: int) -> np.ndarray | None:
        """The places of a shard that are not dropped; None when all are kept."""
        dropped = self._dropped[shard]
        if dropped is None:
            return None
        return np.delete(np.arange(self.disk_rows[shard]), dropped)

    @cached_property
    def first_chunks(self) -> np.ndarray:
        """(S + 1,): number of the first chunk of every shard; the last is C."""
        return _cumulative(-(-self.disk_rows // self.chunk_rows))

    @cached_property
    def chunk_bounds(self) -> np.ndarray:
        """(C + 1,): row number at which every chunk begins."""
        chunk = np.arange(self.first_chunks[-1])
        shard = np.repeat(np.arange(len(self.disk_rows)), np.diff(self.first_chunks))
        starts = self.starts[shard] + (chunk - self.first_chunks[shard]) * self.chunk_rows
        starts = np.append(starts, self.starts[-1])
        return starts - np.searchsorted(self.dropped, starts)

    def by_shard(self, numbers: np.ndarray) -> Iterator[tuple[int, slice, np.ndarray]]:
        """Ascending numbers -> (shard, where they stand in `numbers`, numbers inside the shard)."""
        ends = np.searchsorted(numbers, self.bounds)
        for shard in np.flatnonzero(np.diff(ends)).tolist():
            places = slice(int(ends[shard]), int(ends[shard + 1]))
            yield shard, places, numbers[places] - self.bounds[shard]

    def pieces(self, numbers: np.ndarray) -> list[Piece]:
        """What to read for row numbers, a piece a chunk; places are slices where they are runs."""
        order = None
        if len(numbers) > 1 and (np.diff(numbers) < 0).any():
            order = np.argsort(numbers, kind="stable")
            numbers = numbers[order]
        shard, place = self.locate(numbers)
        chunk = place // self.chunk_rows
        new = np.flatnonzero((np.diff(shard) != 0) | (np.diff(chunk) != 0)) + 1
        cuts = np.concatenate([[0], new, [len(numbers)]]) if len(numbers) else np.zeros(1, int)
        pieces = []
        for first, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            inner = place[first:end] - chunk[first] * self.chunk_rows
            result = slice(first, end) if order is None else order[first:end]
            pieces.append((int(shard[first]), int(chunk[first]), _run(inner), result))
        return pieces


def _run(places: np.ndarray) -> Places:
    """The same places as a slice, when they follow one another."""
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places) and (np.diff(places) == 1).all():
        return slice(first, last + 1)
    return places


def _cumulative(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _present(dropped: list[np.ndarray | None]) -> Iterator[tuple[int, np.ndarray]]:
    return ((shard, places) for shard, places in enumerate(dropped) if places is not None)
