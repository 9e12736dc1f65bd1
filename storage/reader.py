"""TokenStore: rows of a store by number, over all its shards.

    store = TokenStore("data/imagenet")
    store.read_codes([5, 1_000_000])     # (2, N) uint16
    store.table(["key", "class_id"])     # pyarrow

Row numbers run through the shards in name order. A shard is checked when it is first read.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage.fingerprint import fingerprint
from storage.schema import SKIPPED_SCHEMA, TABLE_SCHEMA, StoreMismatch, read_meta
from storage.shard import read_array, read_skipped, read_table
from storage.writer import expected_shards, finished_shards


class TokenStore:
    """A store opened for reading. Shards that appear later are not seen."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.meta = read_meta(self.path)
        self.manifests = finished_shards(self.path)
        for name, manifest in self.manifests.items():
            if manifest["store"] != self.meta.fingerprint:
                raise StoreMismatch(f"{self.path}: shard {name} was made for another store")
        counts = [manifest["rows"] for manifest in self.manifests.values()]
        self.offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # (shards + 1,)
        self._arrays: dict[tuple[str, str], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __repr__(self) -> str:
        columns = ", ".join(f"{n} {c.dtype}{c.shape}" for n, c in self.meta.arrays.items())
        return f"TokenStore({self.path}: {len(self):,} rows, {len(self.shards)} shards, {columns})"

    @cached_property
    def shards(self) -> list[str]:
        """Names of the shards, in row order."""
        return list(self.manifests)

    def shard_array(self, name: str, column: str = "codes") -> np.ndarray:
        """An array column of one shard (rows, ...), checked; kept open or in memory after."""
        if (name, column) not in self._arrays:
            folder = self.path / "shards" / name
            array = read_array(folder, self.meta, self.manifests[name], column)
            self._arrays[name, column] = array
        return self._arrays[name, column]

    def read_codes(self, rows: Any, column: str = "codes") -> np.ndarray:
        """Rows of an array column in the order asked for: (n, N), the column's dtype.

        rows: integers in [0, len(store)); a slice is fine too. Raises IndexError beyond the end.
        """
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, np.int64)
        if rows.size and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()}, the store has {len(self)}")
        spec = self.meta.arrays[column]
        result = np.empty((len(rows), *spec.shape), spec.dtype)
        by_row = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[by_row], self.offsets)  # where each shard's rows begin
        for index, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if end > first:
                places = by_row[first:end]
                shard = self.shard_array(self.shards[index], column)
                result[places] = shard[rows[places] - self.offsets[index]]
        return result

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """The table columns (storage.schema.TABLE_SCHEMA) of all rows, in row order."""
        parts = [read_table(self.path / "shards" / name, columns) for name in self.shards]
        wanted = [TABLE_SCHEMA.field(name) for name in columns or TABLE_SCHEMA.names]
        return pa.concat_tables([pa.schema(wanted).empty_table(), *parts])

    def read_column(self, name: str) -> np.ndarray:
        """One table column of all rows as a numpy array; a missing class_id is -1."""
        column = self.table([name])[name]
        return (column.fill_null(-1) if name == "class_id" else column).to_numpy()

    def skipped(self) -> pa.Table:
        """All rejected samples: key, source, reason."""
        parts = [read_skipped(self.path / "shards" / name) for name in self.shards]
        return pa.concat_tables([SKIPPED_SCHEMA.empty_table(), *parts])

    def content_fingerprint(self, column: str = "codes") -> str:
        """sha256 of what a column holds: the store's fingerprint and every chunk's checksum."""
        chunks = {name: m["chunks"][column] for name, m in self.manifests.items()}
        return fingerprint([self.meta.fingerprint, column, chunks])

    def missing_shards(self) -> list[str]:
        """Shards that were to be made (writer.expect_shards) and are not there."""
        return sorted(expected_shards(self.path) - set(self.shards))
