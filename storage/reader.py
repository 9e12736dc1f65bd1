"""TokenStore: rows of a store by number, over all its shards, from a folder or any fsspec URL.

    store = TokenStore("data/imagenet")
    store.read_codes([5, 1_000_000])     # (2, N) uint16
    store.table(["key", "class_id"])     # pyarrow

Row numbers run through the shards in name order; dropped rows (storage/tombstones.py) do not
count and cannot be read. What is read is checked. A store opened is a snapshot: shards and
tombstones that appear later are not seen.
"""

import difflib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from storage.array_column import ArrayColumnReader
from storage.atomic import parse_json
from storage.files import CacheOptions, open_files
from storage.filters import Filter, check_columns, parse_filter
from storage.index import Index, open_index
from storage.row_numbers import Piece, RowNumbers
from storage.schema import SKIPPED_SCHEMA, TABLE_SCHEMA, read_meta
from storage.shard import MANIFEST, ROWS, read_rows, read_skipped, split_folder
from storage.tombstones import dropped_rows, read_tombstones
from storage.writer import expected_shards

REQUESTS = 16  # at the same time, where what is read lies far away
Rows = Any  # integers, a slice, or a boolean mask over all rows
ATTEMPTS = 3  # to open a store whose shards are being rewritten


class TokenStore:
    """A store opened for reading. Opening reads the index (or the manifests) and the tombstones."""

    def __init__(self, location: str | Path, cache: CacheOptions | None = None):
        """cache: where a remote store's bytes are kept (storage/files.py). Raises ValueError or
        FileNotFoundError for what is not a store, is damaged, or holds shards of another one."""
        self.files = open_files(location, cache)
        self.path = location
        self.meta = read_meta(self.files)
        for attempt in range(ATTEMPTS):
            try:
                self.index: Index = open_index(self.files)
                self.tombstones = read_tombstones(self.files)
                dropped = dropped_rows(self.files, self.tombstones, self.index)
                break
            except FileNotFoundError:  # a shard was rewritten and its old version removed?
                if attempt == ATTEMPTS - 1:
                    raise
        self.numbers = RowNumbers(
            self.index.rows, [dropped.get(f) for f in self.index.folders], self.meta.chunk_rows
        )
        self._columns: dict[tuple[int, str], ArrayColumnReader] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        columns = ", ".join(f"{n} {c.dtype}{c.shape}" for n, c in self.meta.arrays.items())
        return f"TokenStore({self.path}: {len(self):,} rows, {len(self.shards)} shards, {columns})"

    @property
    def is_local(self) -> bool:
        """Whether its files lie on this machine's file system and can be mapped."""
        return self.files.local_path("shards") is not None

    @cached_property
    def shards(self) -> list[str]:
        """Names of the shards, in row order."""
        return [split_folder(folder)[0] for folder in self.index.folders]

    @cached_property
    def columns(self) -> dict[str, str]:
        """Table columns -> type; TABLE_SCHEMA's and those that some shard has beside them."""
        found = {field.name: str(field.type) for field in TABLE_SCHEMA}
        for summary in self.index.summaries:
            for name, kind in summary["columns"].items():
                if found.setdefault(name, kind) != kind:
                    raise ValueError(
                        f"{self.path}: column {name} is {kind} in shard {summary['name']}, "
                        f"{found[name]} before: append it again, with one type"
                    )
        return found

    # codes

    def read_codes(
        self, rows: Rows, column: str = "codes", out: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows of an array column in the order asked for: (n, N), the column's dtype.

        out: filled and returned, where given. Chunks are decoded once each, by all cores. Raises
        IndexError beyond the end, ValueError for a damaged chunk.
        """
        numbers = self._row_numbers(rows)
        spec = self.meta.arrays[self._array(column)]
        if out is None:
            out = np.empty((len(numbers), *spec.shape), spec.dtype)
        pieces = self.numbers.pieces(numbers)
        threads = (os.cpu_count() or 1) if self.is_local else REQUESTS
        runs = [pieces[part::threads] for part in range(min(threads, len(pieces)))]
        if len(pieces) < 4:
            self._read_pieces(column, pieces, out)
        else:
            with ThreadPoolExecutor(threads) as pool:
                for done in [pool.submit(self._read_pieces, column, run, out) for run in runs]:
                    done.result()
        return out

    def chunk_bounds(self) -> np.ndarray:
        """(C + 1,) int64: chunk c holds rows bounds[c]..bounds[c+1] - 1; some may hold none."""
        return self.numbers.chunk_bounds

    def rows_in_place(self, shard: int, chunks: np.ndarray, column: str = "codes") -> np.ndarray:
        """All rows on disk of shard number `shard`, (rows, N), as a view of the mapped file.

        chunks: those that will be read; they are checked. Dropped rows are among them: take the
        places from `numbers.locate`. Raises ValueError for a store that is not local and arrow.
        """
        rows = self._column(shard, column).in_place(chunks)
        if rows is None:
            raise ValueError(f"{self.path} is not an arrow store on a local disk: preload it")
        return rows

    def content_fingerprint(self, column: str = "codes") -> str:
        """sha256 of what a column holds: codes, by shard; the same for both backends."""
        digest = hashlib.sha256(f"{self.meta.fingerprint} {self._array(column)}".encode())
        for shard, summary in enumerate(self.index.summaries):
            digest.update(f"\n{summary['name']} {summary['content'][column]}".encode())
            if (dropped := self.numbers.dropped_in(shard)) is not None:
                digest.update(dropped.tobytes())
        return digest.hexdigest()

    # everything else of a row

    def table(self, columns: list[str] | None = None, rows: Rows = None) -> pa.Table:
        """Table columns as pyarrow, in the order asked for; all rows when `rows` is None.

        A column that some shard lacks is null there. Raises ValueError for an unknown one.
        """
        wanted = self._schema(columns)
        if rows is None:
            parts = [self._shard_table(shard, wanted) for shard in range(len(self.shards))]
            return pa.concat_tables([wanted.empty_table(), *parts])
        numbers = self._row_numbers(rows)
        order = np.argsort(numbers, kind="stable")
        parts = []
        for shard, _, inner in self.numbers.by_shard(numbers[order]):
            parts.append(self._shard_table(shard, wanted, inner))
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.concat_tables([wanted.empty_table(), *parts]).take(back)

    def read_column(self, name: str) -> np.ndarray:
        """One table column of all rows as a numpy array; a missing class_id is -1."""
        column = self.table([name])[name]
        return (column.fill_null(-1) if name == "class_id" else column).to_numpy()

    def to_arrow(self, columns: list[str] | None = None, rows: Rows = None) -> pa.Table:
        """Array columns (as fixed-size lists) and table columns side by side; in memory."""
        columns = [*self.meta.arrays, *self.columns] if columns is None else columns
        numbers = np.arange(len(self)) if rows is None else self._row_numbers(rows)
        table = self.table([c for c in columns if c not in self.meta.arrays], numbers)
        found = dict(zip(table.column_names, table.columns, strict=True))
        for column in (c for c in columns if c in self.meta.arrays):
            codes = self.read_codes(numbers, column)
            width = int(np.prod(codes.shape[1:]))
            found[column] = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), width)
        return pa.table({column: found[column] for column in columns})

    def dataset(self) -> ds.Dataset:
        """A pyarrow dataset of the table columns, for scans with filters pushed down to Parquet.

        Of its files only the pages are checked, as Parquet does it.
        """
        filesystem, root = fsspec.url_to_fs(self.files.url)
        paths = [f"{root}/shards/{folder}/{ROWS}" for folder in self.index.folders]
        checked = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        format = ds.ParquetFileFormat(default_fragment_scan_options=checked)
        schema = self._schema(None)
        dataset = ds.dataset(paths, schema=schema, format=format, filesystem=filesystem)
        for tombstone in self.tombstones:
            found = pc.field(tombstone.column).isin(tombstone.values)
            dataset = dataset.filter(~found | found.is_null())
        return dataset

    def rows_where(self, condition: str | Filter) -> np.ndarray:
        """Numbers, ascending int64, of the rows for which a filter holds (storage/filters.py).

        Reads only the columns that it names, shard by shard. Raises ValueError for a bad filter.
        """
        chosen = parse_filter(condition) if isinstance(condition, str) else condition
        check_columns(chosen, self._schema(None))
        wanted = self._schema(chosen.columns)
        found = [np.empty(0, np.int64)]
        for shard, table in enumerate(self._tables(wanted)):
            rows = pa.array(np.arange(len(table)) + self.numbers.bounds[shard])
            table = table.append_column("row number", rows).filter(chosen.expression)
            found.append(table["row number"].to_numpy())
        return np.concatenate(found)

    def shard_column(self, shard: int, name: str) -> np.ndarray:
        """A table column of one shard's rows as numpy; a missing class_id is -1."""
        column = self._shard_table(shard, self._schema([name]))[name]
        return (column.fill_null(-1) if name == "class_id" else column).to_numpy()

    def skipped(self) -> pa.Table:
        """All rejected samples: key, source, reason."""
        parts = [
            read_skipped(self.files, f"shards/{self.index.folders[shard]}", self.manifest(shard))
            for shard, summary in enumerate(self.index.summaries)
            if summary["skipped"]
        ]
        return pa.concat_tables([SKIPPED_SCHEMA.empty_table(), *parts])

    def missing_shards(self) -> list[str]:
        """Shards that were to be made (writer.expect_shards) and are not there."""
        return sorted(expected_shards(self.files) - set(self.shards))

    def manifest(self, shard: int) -> dict[str, Any]:
        """The manifest of shard number `shard`. Raises ValueError when it has changed."""
        name = f"shards/{self.index.folders[shard]}/{MANIFEST}"
        try:
            content = self.files.read(name)
        except FileNotFoundError:
            gone = f"{self.files.url}/{name} is gone"
            raise FileNotFoundError(f"{gone}: the store was rewritten; open it again") from None
        if hashlib.sha256(content).digest() != self.index.table["manifest"][shard].as_py():
            changed = f"{self.files.url}/{name} is not the one that was sealed"
            raise ValueError(f"{changed}: run muse-store verify there, or seal it again")
        return parse_json(content, name)

    def _row_numbers(self, rows: Rows) -> np.ndarray:
        if isinstance(rows, slice):
            return np.arange(len(self))[rows]
        rows = np.asarray(rows)
        if rows.dtype == bool:
            if len(rows) != len(self):
                raise IndexError(f"a mask of {len(rows)}, the store has {len(self)} rows")
            return np.flatnonzero(rows)
        if rows.size and rows.dtype.kind not in "iu":
            raise IndexError(f"rows of {rows.dtype}: integers, a slice or a mask are wanted")
        rows = rows.astype(np.int64)
        if rows.size and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()}, the store has {len(self)}")
        return rows

    def _array(self, column: str) -> str:
        if column not in self.meta.arrays:
            raise ValueError(f"no array column {column!r} in {self.path}: {list(self.meta.arrays)}")
        return column

    def _schema(self, columns: list[str] | None) -> pa.Schema:
        known = self.columns
        for name in columns or []:
            if name not in known:
                near = difflib.get_close_matches(name, known) or list(known)
                raise ValueError(f"no column {name!r} in {self.path}; there is {', '.join(near)}")
        return pa.schema([self._field(name) for name in (known if columns is None else columns)])

    def _field(self, name: str) -> pa.Field:
        if name in TABLE_SCHEMA.names:
            return TABLE_SCHEMA.field(name)
        shard = next(i for i, s in enumerate(self.index.summaries) if name in s["columns"])
        empty = self._read_rows(shard, [name], np.empty(0, np.int64))
        return pa.field(name, empty.schema.field(name).type)

    def _tables(self, wanted: pa.Schema) -> Iterator[pa.Table]:
        return (self._shard_table(shard, wanted) for shard in range(len(self.shards)))

    def _shard_table(
        self, shard: int, wanted: pa.Schema, rows: np.ndarray | None = None
    ) -> pa.Table:
        """Rows of a shard, counted without the dropped ones (None: all), of the wanted columns."""
        kept = self.numbers.kept_in(shard)
        places = kept if rows is None else rows if kept is None else kept[rows]
        table = self._read_rows(shard, wanted.names or ["key"], places)
        count = len(table) if places is None else len(places)
        arrays = [
            table[field.name] if field.name in table.column_names else pa.nulls(count, field.type)
            for field in wanted
        ]
        return pa.Table.from_arrays(arrays, schema=wanted)

    def _read_rows(
        self, shard: int, columns: list[str], rows: np.ndarray | None = None
    ) -> pa.Table:
        """Table columns of rows of a shard on disk; those that it lacks are left out."""
        folder = f"shards/{self.index.folders[shard]}"
        return read_rows(self.files, folder, self.manifest(shard), columns, rows)

    def _column(self, shard: int, column: str) -> ArrayColumnReader:
        key = shard, self._array(column)
        if key not in self._columns:
            folder = f"shards/{self.index.folders[shard]}"
            manifest = self.manifest(shard)
            self._columns[key] = ArrayColumnReader(self.files, self.meta, folder, manifest, column)
        return self._columns[key]

    def _read_pieces(self, column: str, pieces: list[Piece], out: np.ndarray) -> None:
        """Copies rows of chunks to their places in `out`, decoding in place where it can."""
        for shard, chunk, inner, places in pieces:
            reader = self._column(shard, column)
            size = reader.chunk_size(chunk)
            if isinstance(places, slice) and places.stop - places.start == size:
                reader.read([chunk], [out[places]])
            else:
                rows = np.empty((size, *out.shape[1:]), out.dtype)
                reader.read([chunk], [rows])
                out[places] = rows[inner]
