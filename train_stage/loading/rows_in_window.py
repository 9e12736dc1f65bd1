"""Rows of a store larger than memory, or far away: a few windows of chunks are held, no more.

The order (window_order.py) visits the chunks of one window before those of the next,
so that every chunk is read and decoded once an epoch, while the window before it is in use.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from storage.reader import TokenStore
from train_stage.loading.columns import Column, length_of
from train_stage.loading.compiled_loops import gather
from train_stage.loading.held_columns import Held, join_rows, read_columns, take_rows
from train_stage.loading.window_order import Window, WindowOrder

HELD = 3  # windows: the one in use, the next, and the one before, which a batch may straddle
LABELLED_SHARDS = 4096  # whose class ids are kept


@dataclass
class Loaded:
    """The rows of a window, its chunks one after the other."""

    flat: np.ndarray  # the codes, (rows · N,)
    class_ids: np.ndarray  # (rows,) int64
    columns: dict[str, Held]  # the others that are wanted
    buffer: np.ndarray  # what codes are the beginning of


class RowsInWindow:
    """Places of the stream to codes and classes, through windows loaded ahead of need."""

    def __init__(
        self,
        store: TokenStore,
        column: str,
        order: WindowOrder,
        chosen: np.ndarray | None,
        unit_starts: np.ndarray | None,
        columns: Sequence[Column] = (),
    ):
        """chosen, unit_starts: as in StoreStream; None where picks are rows, units are picks."""
        self.store, self.column, self.order = store, column, order
        self.chosen, self.unit_starts, self.columns = chosen, unit_starts, columns
        self._free: list[np.ndarray] = []
        self._now: Window | None = None
        self._held: OrderedDict[int, Future[Loaded]] = OrderedDict()  # by first place
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._labels: OrderedDict[int, np.ndarray] = OrderedDict()  # shard -> class ids
        self._labelled = any(s["largest_class_id"] != -1 for s in store.index.summaries)

    def index(self, places: np.ndarray, picks: np.ndarray) -> np.ndarray:
        """(n,) int64, for `read`: where in their windows the picks are that stand at `places`."""
        index = np.empty_like(picks)
        if not len(places):
            return index
        for window in self.order.windows(int(places[0]), int(places[-1]) + 1):
            part = slice(*np.searchsorted(places, [window.first, window.end]))
            begins, sizes = self._pick_ranges(window)
            which = np.searchsorted(begins, picks[part], side="right") - 1
            index[part] = picks[part] - (begins - (np.cumsum(sizes) - sizes))[which]
        return index

    def read(
        self, places: np.ndarray, index: np.ndarray, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Codes (n, N), in `out` where given, class ids (n,) int64 and the columns of what stands
        at `places` (ascending) of the stream."""
        spec = self.store.meta.arrays[self.column]
        codes = np.empty((len(index), *spec.shape), spec.dtype) if out is None else out
        class_ids = np.empty(len(index), np.int64)
        parts = []
        begin, width = 0, math.prod(spec.shape)
        while begin < len(places):
            window = self._enter(int(places[begin]))
            end = len(places)
            if places[-1] >= window.end:
                end = int(np.searchsorted(places, window.end))
            loaded = self._request(window).result()
            inside = index[begin:end] * width
            gather(loaded.flat, inside, len(inside), codes.shape[1:], codes[begin:end])
            np.take(loaded.class_ids, index[begin:end], out=class_ids[begin:end], mode="clip")
            parts.append(take_rows(loaded.columns, index[begin:end]))
            begin = end
        return codes, class_ids, join_rows(parts)

    def _enter(self, place: int) -> Window:
        """The window that a place lies in; the one after it is requested, too."""
        if self._now is None or not self._now.first <= place < self._now.end:
            self._now = self.order.windows(place, place + 1)[0]
            self._request(self._now)
            self._request(self.order.windows(self._now.end, self._now.end + 1)[0])
        return self._now

    def _request(self, window: Window) -> "Future[Loaded]":
        """Has a window loaded in the background, unless it is held or on its way."""
        if window.first not in self._held:
            self._held[window.first] = self._reader.submit(self._load, window)
            while len(self._held) > HELD:
                _, old = self._held.popitem(last=False)
                if old.done() and old.exception() is None:
                    self._free.append(old.result().buffer)
        self._held.move_to_end(window.first)
        return self._held[window.first]

    def _load(self, window: Window) -> Loaded:
        begins, sizes = self._pick_ranges(window)
        picks = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        rows = picks if self.chosen is None else self.chosen[picks]
        buffer = self._buffer(len(rows))
        codes = self.store.read_codes(rows, self.column, out=buffer[: len(rows)])
        columns = read_columns(self.store, self.columns, rows)
        return Loaded(codes.reshape(-1), self._class_ids(rows), columns, buffer)

    def _buffer(self, rows: int) -> np.ndarray:
        """Room for a window, of one that is held no more: fresh memory is slow to come by."""
        while self._free:
            buffer = self._free.pop()
            if len(buffer) >= rows:
                return buffer
        spec = self.store.meta.arrays[self.column]
        return np.empty((rows + rows // 16, *spec.shape), spec.dtype)

    def _pick_ranges(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """For every chunk of a window, ascending, its first pick and its number of picks."""
        begins, ends = self.order.bounds[window.chunks], self.order.bounds[window.chunks + 1]
        if self.unit_starts is not None:
            begins, ends = self.unit_starts[begins], self.unit_starts[ends]
        return begins, ends - begins

    def _class_ids(self, rows: np.ndarray) -> np.ndarray:
        class_ids = np.full(len(rows), -1, np.int64)
        if self._labelled:
            for shard, places, inner in self.store.numbers.by_shard(rows):
                class_ids[places] = self._shard_labels(shard)[inner]
        return class_ids

    def _shard_labels(self, shard: int) -> np.ndarray:
        if shard not in self._labels:
            self._labels[shard] = self.store.shard_column(shard, "class_id")
            if len(self._labels) > LABELLED_SHARDS:
                self._labels.popitem(last=False)
        return self._labels[shard]


def check_windows(
    store: TokenStore, columns: Sequence[Column], window_chunks: int, states_gb: float
) -> None:
    """Raises ValueError where text states in windows, by the largest shard's, exceed states_gb."""
    row_bytes = 0.0
    shard = int(np.diff(store.numbers.bounds).argmax())
    for column in (column for column in columns if column.kind == "states"):
        lengths = store.shard_column(shard, length_of(column.name))
        row_bytes += 2 * column.shape[1] * float(lengths.mean())
    chunk_gb = HELD * row_bytes * store.meta.chunk_rows / 1e9
    chunks = min(window_chunks, len(store.chunk_bounds()) - 1)
    if chunks * chunk_gb > states_gb:
        most = max(1, int(states_gb / chunk_gb))
        raise ValueError(
            f"{store.path}: {HELD} windows of {chunks} chunks hold about {chunks * chunk_gb:,.1f} "
            f"GB of text states, dataset.states_gb={states_gb:g}: take "
            f"dataset.window_chunks={most}, or more dataset.states_gb"
        )
