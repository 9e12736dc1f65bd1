"""The columns that rows have beside codes and class, in memory or mapped, and rows of them.

Step 5: `hold_columns` for a whole run, `read_columns` for a window of chunks; `take_rows` makes a
batch. Rows are picked by number among those that are held.

b rows of a batch, S positions of a text, W width of a state.
"""

from collections.abc import Mapping, Sequence
from math import inf, prod

import numpy as np

from storage.progress import for_each, no_progress, progress_bar
from storage.reader import TokenStore
from train_stage.loading.columns import (
    Column,
    length_of,
    read_numbers,
    read_states,
    spans_of,
)
from train_stage.loading.compiled_loops import gather
from train_stage.loading.rows_in_memory import RowsInMemory, available_memory, check_fits
from train_stage.loading.rows_in_place import RowsInPlace

SMALLEST = ("uint8", "int8", "float16", "uint16", "int16")
SPAN = 4096  # rows whose states are read at once: 150 MB, as a rule


class Fixed:
    """Rows of one shape, held whole."""

    def __init__(self, rows: np.ndarray):
        """rows: (n, *shape)."""
        self.shape, self.dtype = rows.shape[1:], rows.dtype
        self._width = prod(self.shape)
        self._flat = rows.reshape(-1).view(f"u{rows.dtype.itemsize}")

    def take(self, picks: np.ndarray) -> np.ndarray:
        """(b, *shape) of row numbers (b,) int64."""
        taken = gather(self._flat, picks * self._width, len(picks), self.shape)
        return taken.view(self.dtype)


class InPlace:
    """The same, where they lie in a mapped arrow store."""

    def __init__(self, rows: RowsInPlace, chosen: np.ndarray | None):
        self._rows, self._chosen = rows, chosen

    def take(self, picks: np.ndarray) -> np.ndarray:
        """(b, *shape) of numbers of chosen rows (b,) int64."""
        rows = picks if self._chosen is None else self._chosen[picks]
        return self._rows.gather(self._rows.index(rows), len(rows)).view(self._rows.dtype)


class Numbers:
    """A number a row, kept in the smallest dtype that has all of them."""

    def __init__(self, values: np.ndarray):
        """values: (n,) float32 or int64, as they are delivered."""
        self.dtype, self._values = values.dtype, smallest(values)

    def take(self, picks: np.ndarray) -> np.ndarray:
        """(b,) of row numbers (b,) int64."""
        return self._values.take(picks).astype(self.dtype)


class States:
    """A vector for every token of a row's text, all rows' in one array."""

    def __init__(self, flat: np.ndarray, lengths: np.ndarray, longest: int):
        """flat: (sum of lengths + 1, W) float16, the last all zeros; lengths: (n,) up to longest.

        Raises ValueError for a longer one.
        """
        if lengths.max(initial=0) > longest:
            raise ValueError(f"text states of {lengths.max()} tokens; the store says {longest}")
        self._flat, self._places = flat.reshape(-1).view("u2"), np.arange(longest)
        self._width, self._zeros = flat.shape[1], len(flat) - 1
        self._starts = np.append(0, np.cumsum(lengths, dtype=np.int64))

    def lengths(self, picks: np.ndarray) -> np.ndarray:
        """How many tokens rows have, (b,) int64."""
        return self._starts[picks + 1] - self._starts[picks]

    def take(self, picks: np.ndarray) -> np.ndarray:
        """(b, S, W) float16, zeros beyond each row's length."""
        places = self._starts[picks][:, None] + self._places  # (b, S)
        places[self._places >= self.lengths(picks)[:, None]] = self._zeros
        index = places.reshape(-1) * self._width
        taken = gather(self._flat, index, len(index), (self._width,))
        return taken.view(np.float16).reshape(*places.shape, self._width)


Held = Fixed | InPlace | Numbers | States


def take_rows(held: Mapping[str, Held], picks: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of every column; beside text_states_NAME comes text_length_NAME (b,) int64."""
    found = {}
    for name, column in held.items():
        found[name] = column.take(picks)
        if isinstance(column, States):
            found[length_of(name)] = column.lengths(picks)
    return found


def join_rows(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of several holders, one after the other; {} of none."""
    if len(parts) < 2:
        return parts[0] if parts else {}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def hold_columns(
    store: TokenStore,
    columns: Sequence[Column],
    chosen: np.ndarray | None,
    in_place: bool,
    states_gb: float,
    quiet: bool,
) -> dict[str, Held]:
    """Columns of the chosen rows (numbers, ascending; None: all) for a whole run.

    in_place: arrays of a mapped store stay where they are. Raises ValueError for more text states
    than states_gb, MemoryError for more than fit.
    """
    found: dict[str, Held] = {}
    for column in columns:
        if column.kind == "array" and in_place:
            found[column.name] = InPlace(RowsInPlace(store, column.name), chosen)
        elif column.kind == "array":
            found[column.name] = Fixed(RowsInMemory(store, column.name, chosen, quiet).codes)
        elif column.kind == "states":
            found[column.name] = hold_states(store, column, chosen, states_gb, quiet)
    numbers = [column for column in columns if column.kind == "number"]
    return found | {k: Numbers(v) for k, v in read_numbers(store, numbers, chosen).items()}


def read_columns(store: TokenStore, columns: Sequence[Column], rows: np.ndarray) -> dict[str, Held]:
    """Columns of rows (numbers, ascending) that lie together, for a window."""
    found: dict[str, Held] = {}
    for column in columns:
        if column.kind == "array":
            found[column.name] = Fixed(store.read_codes(rows, column.name))
        elif column.kind == "states":
            found[column.name] = hold_states(store, column, rows)
    numbers = [column for column in columns if column.kind == "number"]
    return found | {k: Numbers(v) for k, v in read_numbers(store, numbers, rows).items()}


def hold_states(
    store: TokenStore,
    column: Column,
    rows: np.ndarray | None,
    states_gb: float = inf,
    quiet: bool = True,
) -> States:
    """Text states of rows (ascending; None: all); their size is known, and told, beforehand.

    Parquet gives 2,000 rows a second and thread, so several threads read.
    """
    length = Column(length_of(column.name), "number", "int64", ())
    lengths = read_numbers(store, [length], rows)[length.name]
    starts = np.append(0, np.cumsum(lengths))
    size = int(starts[-1]) * column.shape[1] * 2
    if size > states_gb * 1e9:
        raise ValueError(
            f"{store.path}: {column.name} of {len(lengths):,} rows takes {size / 1e9:,.1f} GB, "
            f"dataset.states_gb={states_gb:g}: take dataset.shuffle=window (and "
            "dataset.preload=auto), or more dataset.states_gb"
        )
    check_fits(size, available_memory(), f"{store.path}: {column.name}")
    flat = np.empty((int(starts[-1]) + 1, column.shape[1]), np.float16)
    flat[-1] = 0

    def fill(span: tuple[slice, np.ndarray]) -> None:
        places, some = span
        vectors, found = read_states(store, column.name, some)
        if not np.array_equal(found, lengths[places]):
            raise ValueError(f"{store.path}: {column.name} and {length.name} differ in length")
        flat[starts[places.start] : starts[places.stop]] = vectors

    bar = progress_bar(f"loading {size / 1e9:.2f} GB of {column.name}", "part")
    for_each(fill, list(spans_of(store, rows, SPAN)), no_progress if quiet else bar)
    return States(flat, lengths, column.shape[0])


def smallest(values: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest dtype that has them all."""
    with np.errstate(invalid="ignore", over="ignore"):
        for dtype in SMALLEST:
            if np.array_equal(values.astype(dtype), values, equal_nan=True):
                return values.astype(dtype)
    return values
