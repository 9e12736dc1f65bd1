"""One store as an endless shuffled stream: which rows take part, in which order, and their codes.

place in the stream --order--> unit --view of this epoch--> pick --chosen rows--> row number

A unit is what comes once an epoch: a row, or an image with all its views. A pick counts the chosen
rows; without a filter picks are row numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from storage.reader import TokenStore
from train_stage.loading.columns import Column
from train_stage.loading.held_columns import Held, hold_columns, take_rows
from train_stage.loading.order import FullOrder, hash_array, hash_words, permute
from train_stage.loading.rows_in_memory import RowsInMemory, RowsOnDevice
from train_stage.loading.rows_in_place import RowsInPlace
from train_stage.loading.rows_in_window import RowsInWindow, check_windows
from train_stage.loading.window_order import WindowOrder

Shuffle = Literal["full", "window"]
Preload = Literal["auto", "ram", "gpu", "none"]
Views = Literal["all", "one"]
VIEWS = 2  # names the random stream that chooses views


@dataclass(frozen=True)
class Reading:
    """How a store is read; what it says of the order is part of a run's identity."""

    column: str = "codes"
    shuffle: Shuffle = "full"
    window_chunks: int = 256
    views: Views = "all"
    preload: Preload = "auto"
    states_gb: float = 16.0  # of text states in memory, at most


@dataclass
class Plan:
    """Rows to come, in the stream's order; all are (n,) int64."""

    places: np.ndarray
    picks: np.ndarray
    rows: np.ndarray  # row numbers of the store
    index: np.ndarray  # what the holder of the codes calls them
    class_ids: np.ndarray | None  # -1: none; None: windows know them


class StoreStream:
    """Position -> row, codes and class, for ever; nothing in it changes as it is read."""

    def __init__(
        self,
        store: TokenStore,
        reading: Reading,
        seed: int,
        filter: str | None = None,
        max_rows: int | None = None,
        device: torch.device | None = None,
        quiet: bool = True,
        columns: Sequence[Column] = (),
    ):
        """max_rows: use only that many rows, chosen by the seed, of those that pass the filter;
        columns: what is read beside codes and class.

        Raises ValueError when no row is left, or for a store that cannot be read in this way.
        """
        self.store, self.reading, self.filter, self.columns = store, reading, filter, columns
        self.chosen = choose_rows(store, filter, max_rows, seed)
        count = len(store) if self.chosen is None else len(self.chosen)
        if not count:
            raise ValueError(no_rows_message(store, filter))
        self.seed = seed
        self.unit_starts = None if reading.views == "all" else find_units(store, self.chosen)
        self.size = count if self.unit_starts is None else len(self.unit_starts) - 1
        self.order: FullOrder | WindowOrder = FullOrder(self.size, seed)
        if reading.shuffle == "window":
            bounds = store.chunk_bounds()
            if self.chosen is not None:
                bounds = np.searchsorted(self.chosen, bounds)
            if self.unit_starts is not None:
                bounds = np.searchsorted(self.unit_starts[:-1], bounds)
            self.order = WindowOrder(bounds, reading.window_chunks, seed)
        self.holder = self._hold(device, quiet)
        self._class_ids: np.ndarray | None = None  # windows know them, and the other columns
        self._held: dict[str, Held] = {}
        if not isinstance(self.holder, RowsInWindow):
            self._class_ids = self._all_class_ids()
            in_place = isinstance(self.holder, RowsInPlace)
            gb = reading.states_gb
            self._held = hold_columns(store, columns, self.chosen, in_place, gb, quiet)

    def plan(self, places: np.ndarray) -> Plan:
        """What stands at these places (n,) of the stream, ascending."""
        units = self.order.places(places)
        picks = units
        if self.unit_starts is not None:
            first = self.unit_starts[units]
            views = (self.unit_starts[units + 1] - first).astype(np.uint64)
            epochs = (places // self.size).astype(np.uint64)
            key = hash_words(self.seed, VIEWS)
            draw = hash_array(units.astype(np.uint64) ^ hash_array(epochs ^ key))
            picks = first + ((draw >> np.uint64(32)) % views).astype(np.int64)
        rows = picks if self.chosen is None else self.chosen[picks]
        match self.holder:
            case RowsInMemory():
                index = self.holder.index(picks)
            case RowsInPlace():
                index = self.holder.index(rows)
            case RowsInWindow():
                index = self.holder.index(places, picks)
            case RowsOnDevice():
                index = picks
        class_ids = None
        if self._class_ids is not None:
            class_ids = self._class_ids.take(picks).astype(np.int64)
        return Plan(places, picks, rows, index, class_ids)

    def read(
        self, plan: Plan, part: slice, out: np.ndarray | None = None
    ) -> tuple[np.ndarray | Tensor, np.ndarray, dict[str, np.ndarray]]:
        """Codes (n, N), narrow, class ids (n,) int64 (-1: none) and columns of a part of a plan.

        out: filled with the codes and returned, unless they are on a device.
        """
        if isinstance(self.holder, RowsInWindow):
            return self.holder.read(plan.places[part], plan.index[part], out)
        assert plan.class_ids is not None
        rows = part.stop - part.start
        codes = self.holder.gather(plan.index[part], rows, out)
        return codes, plan.class_ids[part], self.take(plan.picks[part])

    def take(self, picks: np.ndarray) -> dict[str, np.ndarray]:
        """The columns beside codes and class of picks (n,), unless windows know them."""
        return take_rows(self._held, picks)

    def gather(
        self, index: np.ndarray, rows: int, out: np.ndarray | None = None
    ) -> np.ndarray | Tensor:
        """Codes (rows, N) of a plan's index from some place on, if the plan knows class ids."""
        assert not isinstance(self.holder, RowsInWindow)
        return self.holder.gather(index, rows, out)

    @property
    def largest_class_id(self) -> int:
        """Of all rows of the store; -1 when none has a class."""
        known = [summary["largest_class_id"] for summary in self.store.index.summaries]
        if None in known:  # schema version 1 did not note it
            return int(self.store.read_column("class_id").max(initial=-1))
        return max(known, default=-1)

    def identity(self) -> dict[str, object]:
        """What must not change for a position to mean the same row."""
        names = ["column", "shuffle", "views"]
        names += ["window_chunks"] if self.reading.shuffle == "window" else []
        chosen = {name: getattr(self.reading, name) for name in names}
        content = self.store.content_fingerprint(self.reading.column)
        return {**chosen, "rows": self.size, "filter": self.filter, "content": content}

    def _hold(self, device: torch.device | None, quiet: bool) -> "Holder":
        store, column, preload = self.store, self.reading.column, self.reading.preload
        windowed = isinstance(self.order, WindowOrder)
        in_place = store.meta.backend == "arrow" and store.is_local
        if windowed and any(other.kind == "states" for other in self.columns):
            in_place = False  # states are read by windows, and the codes with them
        if preload == "auto":
            preload = "none" if in_place or windowed else "ram"
        if preload == "none" and in_place:
            return RowsInPlace(store, column)
        if preload == "none" and isinstance(self.order, WindowOrder):
            check_windows(store, self.columns, self.reading.window_chunks, self.reading.states_gb)
            chosen, units = self.chosen, self.unit_starts
            return RowsInWindow(store, column, self.order, chosen, units, self.columns)
        if preload == "none":
            raise ValueError(
                f"{store.path}: single rows of a {store.meta.backend} store that is not preloaded "
                "cannot be shuffled freely: take preload=ram, or shuffle=window, or a local arrow "
                "store (muse-store convert --backend arrow)"
            )
        rows = RowsInMemory(store, column, self.chosen, quiet)
        if preload == "gpu":
            return RowsOnDevice(rows, device or torch.device("cuda"))
        return rows

    def _all_class_ids(self) -> np.ndarray:
        """(chosen rows,) of the smallest dtype, so that they stay in a cache."""
        dtype = np.min_scalar_type(-1 - max(0, self.largest_class_id))
        if self.largest_class_id < 0:
            return np.full(len(self.store) if self.chosen is None else len(self.chosen), -1, dtype)
        class_ids = self.store.read_column("class_id").astype(dtype)
        return class_ids if self.chosen is None else class_ids[self.chosen]


Holder = RowsInMemory | RowsOnDevice | RowsInPlace | RowsInWindow


def choose_rows(
    store: TokenStore, filter: str | None, max_rows: int | None, seed: int
) -> np.ndarray | None:
    """Numbers, ascending, of the rows that pass the filter, `max_rows` of them; None for all."""
    rows = None if filter is None else store.rows_where(filter)
    count = len(store) if rows is None else len(rows)
    if max_rows is not None and max_rows < count:
        picks = np.sort(permute(np.arange(max_rows), count, seed))
        rows = picks if rows is None else rows[picks]
    return rows


def find_units(store: TokenStore, chosen: np.ndarray | None) -> np.ndarray:
    """(units + 1,) int64: where among the chosen rows the views of every image begin.

    The views of an image follow one another and have one key and source.
    """
    table = store.table(["key", "source"])
    if chosen is not None:
        table = table.take(chosen)
    new = np.zeros(len(table), bool)
    new[:1] = True
    for column in table.columns:
        values = column.combine_chunks().dictionary_encode().indices.to_numpy()
        new[1:] |= values[1:] != values[:-1]
    return np.append(np.flatnonzero(new), len(table))


def no_rows_message(store: TokenStore, filter: str | None) -> str:
    """Why there is nothing to train on."""
    if len(store):
        return f"{store.path}: none of its {len(store):,} rows passes the filter {filter!r}"
    return f"{store.path} has no rows; run muse-tokenize first"
