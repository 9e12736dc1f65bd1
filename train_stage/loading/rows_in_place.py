"""Rows of a mapped arrow store, gathered where they lie, over any number of shards in one pass.

Nothing is loaded: all processes of a node share the page cache. The shards' mappings are scattered
over the address space; a flat view that spans them all makes a row an offset, whatever its shard.
"""

import ctypes

import numpy as np

from storage.reader import TokenStore
from train_stage.loading.compiled_loops import gather


class RowsInPlace:
    """Rows by number; a chunk is checked when it is first touched."""

    def __init__(self, store: TokenStore, column: str):
        """Raises ValueError for a store that is compressed or remote."""
        spec = store.meta.arrays[column]
        self.store, self.column, self.shape = store, column, tuple(spec.shape)
        self.dtype = np.dtype(spec.dtype)
        self.width = int(np.prod(spec.shape))
        unchecked = np.empty(0, np.int64)
        shards = range(len(store.shards))
        self._mapped = [store.rows_in_place(shard, unchecked, column) for shard in shards]  # kept
        starts = np.array([rows.ctypes.data for rows in self._mapped], np.int64)
        ends = starts + [rows.nbytes for rows in self._mapped]
        full = ends > starts
        first = int(starts[full].min())
        span = (ctypes.c_ubyte * (int(ends[full].max()) - first)).from_address(first)
        flat = np.ctypeslib.as_array(span)  # touched only where mapped
        self._flat = flat.view(f"u{self.dtype.itemsize}")
        begins = (starts - first) // self.dtype.itemsize
        self._before = begins - store.numbers.starts[:-1] * self.width  # as if all came before
        self._unchecked = int(store.numbers.first_chunks[-1])
        self._checked = np.zeros(self._unchecked, bool)

    def index(self, rows: np.ndarray) -> np.ndarray:
        """Offsets (n,) int64, for `gather`, of row numbers; checks the chunks they lie in."""
        numbers = self.store.numbers
        disk = numbers.on_disk(rows)
        shard = numbers.shard_of(disk)
        if self._unchecked:
            self._check(shard, disk - numbers.starts[shard])
        return disk * self.width + self._before.take(shard)

    def gather(self, index: np.ndarray, rows: int, out: np.ndarray | None = None) -> np.ndarray:
        """The rows at the first offsets: (rows, N), in `out` where given; bits, as unsigned."""
        return gather(self._flat, index, rows, self.shape, out)

    def _check(self, shard: np.ndarray, place: np.ndarray) -> None:
        """Checks the chunks of these places, once. Raises ValueError for a damaged one."""
        numbers = self.store.numbers
        chunk = numbers.first_chunks[shard] + place // numbers.chunk_rows
        new = np.unique(chunk[~self._checked[chunk]])
        for part in np.unique(np.searchsorted(numbers.first_chunks, new, side="right") - 1):
            first, end = numbers.first_chunks[part : part + 2]
            inside = new[(new >= first) & (new < end)] - first
            self.store.rows_in_place(int(part), inside, self.column)
        self._checked[new] = True
        self._unchecked -= len(new)
