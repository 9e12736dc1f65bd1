"""Rows of a store larger than memory, or far away: a few windows of chunks are held, no more.

The order (train_stage/window_order.py) visits the chunks of one window before those of the next,
so that every chunk is read and decoded once an epoch, while the window before it is in use.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from storage.reader import TokenStore
from train_stage.window_order import Window, WindowOrder

HELD = 3  # windows: the one in use, the next, and the one before, which a batch may straddle
LABELLED_SHARDS = 4096  # whose class ids are kept


@dataclass
class Loaded:
    """The rows of a window: picks first[i].. (ascending) begin at row start[i]."""

    first: np.ndarray
    start: np.ndarray
    codes: np.ndarray  # (rows, N)
    class_ids: np.ndarray  # (rows,) int64

    def index(self, picks: np.ndarray) -> np.ndarray:
        """At which row of the window the picks are."""
        part = np.searchsorted(self.first, picks, side="right") - 1
        return picks - self.first[part] + self.start[part]


class RowsInWindow:
    """Places of the stream to codes and classes, through windows loaded ahead of need."""

    def __init__(
        self,
        store: TokenStore,
        column: str,
        order: WindowOrder,
        chosen: np.ndarray | None,
        unit_starts: np.ndarray | None,
    ):
        """chosen, unit_starts: as in StoreStream; None where picks are rows, units are picks."""
        self.store, self.column, self.order = store, column, order
        self.chosen, self.unit_starts = chosen, unit_starts
        self._held: OrderedDict[int, Future[Loaded]] = OrderedDict()  # by first place
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._labels: OrderedDict[int, np.ndarray] = OrderedDict()  # shard -> class ids
        self._labelled = any(s["largest_class_id"] != -1 for s in store.index.summaries)

    def gather(
        self, places: np.ndarray, picks: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The rows of `picks`, which stand at `places` (ascending) of the stream: (n, N)."""
        if out is None:
            spec = self.store.meta.arrays[self.column]
            out = np.empty((len(picks), *spec.shape), spec.dtype)
        for part, loaded in self._parts(places):
            index = loaded.index(picks[part])
            np.take(loaded.codes, index, axis=0, out=out[part], mode="clip")
        return out

    def class_ids(self, places: np.ndarray, picks: np.ndarray) -> np.ndarray:
        """Class ids (n,) int64 of the same rows."""
        out = np.empty(len(picks), np.int64)
        for part, loaded in self._parts(places):
            out[part] = loaded.class_ids[loaded.index(picks[part])]
        return out

    def _parts(self, places: np.ndarray) -> list[tuple[slice, Loaded]]:
        """The windows that places lie in, loaded, each with the part of `places` it holds."""
        if not len(places):
            return []
        windows = self.order.windows(int(places[0]), int(places[-1]) + 1)
        parts = []
        for window in windows:
            begin, end = np.searchsorted(places, [window.first, window.end])
            if end > begin:
                parts.append((slice(int(begin), int(end)), self._request(window).result()))
        self._request(self.order.windows(windows[-1].end, windows[-1].end + 1)[0])
        return parts

    def _request(self, window: Window) -> "Future[Loaded]":
        """Has a window loaded in the background, unless it is held or on its way."""
        if window.first not in self._held:
            self._held[window.first] = self._reader.submit(self._load, window)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(window.first)
        return self._held[window.first]

    def _load(self, window: Window) -> Loaded:
        begins, ends = self.order.bounds[window.chunks], self.order.bounds[window.chunks + 1]
        if self.unit_starts is not None:
            begins, ends = self.unit_starts[begins], self.unit_starts[ends]
        sizes = ends - begins
        start = np.cumsum(sizes) - sizes
        picks = np.repeat(begins - start, sizes) + np.arange(sizes.sum())
        rows = picks if self.chosen is None else self.chosen[picks]
        codes = self.store.read_codes(rows, self.column)
        return Loaded(begins, start, codes, self._class_ids(rows))

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
