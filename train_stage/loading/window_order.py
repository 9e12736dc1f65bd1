"""A shuffled order in which rows that are read together come together: for stores larger than
memory, or far away.

An epoch shuffles the chunks of the store, cuts them into windows, and shuffles the rows of every
window. A reader holds one window, reads the next meanwhile, and reads every chunk once an epoch.
How much shuffling a width of windows loses: `python -m train_stage.loading.shuffle_quality`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from train_stage.loading.order import permute, runs, runs_of


@dataclass(frozen=True)
class Window:
    """Positions [first, end) of the stream hold all the rows of `chunks`, and no others."""

    first: int
    end: int
    chunks: np.ndarray  # (n,) int64, ascending; none is empty


class WindowOrder:
    """The endless stream of epochs over the rows of chunks; position p is in epoch p // size."""

    def __init__(self, bounds: np.ndarray, window_chunks: int, seed: int):
        """bounds: (C + 1,) int64 from 0, ascending: chunk c has rows bounds[c] to bounds[c + 1].

        Windows have at most window_chunks chunks (one decides for uneven numbers: all windows of an
        epoch have equally many, give or take one, so that none is too small to shuffle). Besides
        bounds, 4 bytes a chunk are kept of each of two epochs.
        """
        bounds = np.asarray(bounds, np.int64)
        if len(bounds) < 2 or bounds[0] or bounds[-1] < 1 or (bounds[1:] < bounds[:-1]).any():
            raise ValueError(f"bounds of chunks must ascend from 0 to the number of rows: {bounds}")
        if window_chunks < 1:
            raise ValueError(f"a window of {window_chunks} chunks; it takes 1 or more")
        self.bounds, self.seed, self.size = bounds, seed, int(bounds[-1])
        chunks = len(bounds) - 1
        count = -(-chunks // window_chunks)
        self._cuts = np.arange(count + 1) * chunks // count  # where windows begin among the chunks
        self._epoch = lru_cache(2)(self._shuffle_chunks)
        self._window = lru_cache(4)(self._list_chunks)

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Rows (n,) int64 in [0, size) at positions (n,) of the stream; fastest ascending."""
        places = np.empty(len(positions), np.int64)
        for epoch, part in runs_of(positions, self.size):
            inside = positions[part] - epoch * self.size
            starts = self._epoch(epoch)[1]
            for window, piece in runs(np.searchsorted(starts, inside, side="right") - 1):
                places[part][piece] = self._rows(epoch, window, inside[piece] - starts[window])
        return places

    def windows(self, first: int, end: int) -> list[Window]:
        """The windows that positions [first, end) lie in, in the stream's order, none empty."""
        found = []
        for epoch in range(first // self.size, -(-end // self.size)):
            offset, starts = epoch * self.size, self._epoch(epoch)[1]
            begin, stop = max(first - offset, 0), min(end - offset, self.size)
            last = int(np.searchsorted(starts, stop))
            for window in range(int(np.searchsorted(starts, begin, side="right")) - 1, last):
                if starts[window] < starts[window + 1]:
                    place = int(starts[window]) + offset, int(starts[window + 1]) + offset
                    found.append(Window(*place, self._window(epoch, window)[0]))
        return found

    def _rows(self, epoch: int, window: int, index: np.ndarray) -> np.ndarray:
        """The rows at places `index` of a window."""
        chunks, ends = self._window(epoch, window)
        index = permute(index, int(ends[-1]), self.seed, epoch, window)
        which = np.searchsorted(ends, index, side="right")
        return index - ends[which] + self.bounds[chunks[which] + 1]

    def _shuffle_chunks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's chunks (C,), shuffled, and where its windows begin (W + 1,) int64."""
        count = len(self.bounds) - 1
        chunks = permute(np.arange(count), count, self.seed, epoch)
        sizes = np.diff(self.bounds)[chunks]
        starts = np.append(0, np.cumsum(np.add.reduceat(sizes, self._cuts[:-1])))
        return chunks.astype(np.int32 if count < 2**31 else np.int64), starts

    def _list_chunks(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks (n,) of a window that have rows, ascending, and how many rows up to each."""
        chunks = self._epoch(epoch)[0][self._cuts[window] : self._cuts[window + 1]]
        chunks = np.sort(chunks).astype(np.int64)  # ascending: they are read in order
        sizes = self.bounds[chunks + 1] - self.bounds[chunks]
        return chunks[sizes > 0], np.cumsum(sizes[sizes > 0])
