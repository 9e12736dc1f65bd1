"""What stores have of a row beside codes and class: text ids, text states, scores, sizes.

Step 5: `check_columns` says what batches will have of them; held_columns.py keeps them.

n rows, W width of a state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.reader import TokenStore
from storage.schema import StoreMismatch

STATES, LENGTH = "text_states_", "text_length_"
INTEGERS = ("class_id", LENGTH)  # columns so named come as int64, -1 for null
OPTIONAL = ("aesthetic_score",)  # NaN for all rows of a store without it


@dataclass(frozen=True)
class Column:
    """A column as batches have it: (b, *shape) of the dtype."""

    name: str
    kind: Literal["array", "number", "states"]
    dtype: str
    shape: tuple[int, ...]


def check_columns(stores: Sequence[TokenStore], names: Sequence[str]) -> list[Column]:
    """What the named columns are, the same in all stores.

    Raises StoreMismatch for one that a store lacks, that no batch can have (words), or that is of
    another width, dtype or tokenizer in another store.
    """
    found = [[find_column(store, name) for name in dict.fromkeys(names)] for store in stores]
    for store, columns in zip(stores, found, strict=True):
        for ours, theirs in zip(found[0], columns, strict=True):
            records = text_record(stores[0], ours.name), text_record(store, ours.name)
            for what, a, b in (("", ours, theirs), ("'s text record", *records)):
                if a != b:
                    raise StoreMismatch(
                        f"{store.path} cannot be mixed with {stores[0].path}: "
                        f"{ours.name}{what} {b} != {a}"
                    )
    return found[0]


def find_column(store: TokenStore, name: str) -> Column:
    """What a column of a store is. Raises StoreMismatch, naming those that there are."""
    if name in store.meta.arrays:
        spec = store.meta.arrays[name]
        if np.dtype(spec.dtype).itemsize not in (2, 4):
            raise StoreMismatch(
                f"{store.path}: {name!r} is {spec.dtype}; batches take 2 or 4 bytes"
            )
        return Column(name, "array", spec.dtype, tuple(spec.shape))
    if name not in store.columns and name in OPTIONAL:
        return Column(name, "number", "float32", ())
    if name not in store.columns:
        there = ", ".join([*store.meta.arrays, *store.columns])
        raise StoreMismatch(f"{store.path} has no column {name!r}; there are {there}")
    kind = store.table([name], np.empty(0, np.int64)).schema.field(0).type
    if name.startswith(STATES):
        length = text_record(store, name).get("length")
        if length is None:  # of a store that was not made by muse-tokenize
            column = find_column(store, length_of(name))
            length = int(read_numbers(store, [column], None)[column.name].max(initial=0))
        return Column(name, "states", "float16", (length, kind.value_type.list_size))
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise StoreMismatch(f"{store.path}: column {name!r} is {kind}; batches take numbers")
    return Column(name, "number", "int64" if name.startswith(INTEGERS) else "float32", ())


def text_record(store: TokenStore, name: str) -> dict[str, Any]:
    """What a store says of the tokenizer and the encoder that made a column; {} for other columns.

    The place of the tokenizer is left out: its fingerprint decides.
    """
    kind, _, text = name.removeprefix("text_").partition("_")
    if f"text_{kind}_{text}" != name:
        return {}
    record = store.meta.transform.get("text", {})
    made = dict(record.get("tokenizers", {}).get(text, {}))
    made.pop("name", None)
    if kind in ("pooled", "states"):
        made["encoder"] = record.get("encoders", {}).get(text)
    return made


def length_of(name: str) -> str:
    """text_states_NAME -> text_length_NAME."""
    return name.replace(STATES, LENGTH, 1)


def read_states(store: TokenStore, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The states of rows one after the other, (sum of lengths, W) float16, and lengths (n,) int64.

    Raises ValueError where a row has none.
    """
    column = store.table([name], rows).column(0).combine_chunks()
    if column.null_count:
        raise ValueError(f"{store.path}: {column.null_count} rows have no {name}")
    vectors = column.flatten()
    flat = vectors.flatten().to_numpy().reshape(-1, vectors.type.list_size)
    return flat, np.diff(column.offsets.to_numpy())


def read_numbers(
    store: TokenStore, columns: Sequence[Column], rows: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Table columns of rows (ascending; None: all): (n,) float32, NaN for null, or int64, -1."""
    if not columns:
        return {}
    count = len(store) if rows is None else len(rows)
    found = {column.name: np.empty(count, column.dtype) for column in columns}
    there = {name: values for name, values in found.items() if name in store.columns}
    for name in found.keys() - there.keys():
        found[name].fill(np.nan)
    for places, some in spans_of(store, rows, count) if there else ():
        table = store.table(list(there), some)
        for name, values in there.items():
            cast = table[name].cast(pa.from_numpy_dtype(values.dtype), safe=False)
            cast = pc.fill_null(cast, -1 if values.dtype == np.int64 else np.nan)
            values[places] = cast.to_numpy()
    return found


def spans_of(
    store: TokenStore, rows: np.ndarray | None, most: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Row numbers of one shard, at most so many, and where they stand among the rows."""
    bounds = store.numbers.bounds
    cuts = (bounds if rows is None else np.searchsorted(rows, bounds)).tolist()
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        for first in range(begin, end, most):
            last = min(first + most, end)
            places = np.arange(first, last) if rows is None else rows[first:last]
            yield slice(first, last), places
