"""Dropped rows: a tombstone names them by a column's values, and every reader leaves them out.

STORE/tombstones/<16 hex>.json    column, values, reason; and which rows of which shard folders
                                  these are, so that opening the store reads no column

The values stay in force for shards that come later: a reader finds their rows by itself, `seal`
and `compact` note them. `compact` rewrites the shards without the rows.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.atomic import parse_json, write_json
from storage.files import StoreFiles, open_files
from storage.fingerprint import fingerprint
from storage.index import TOMBSTONES, note_tombstones, open_index, tombstone_names
from storage.shard import ROWS, read_parquet


@dataclass
class Tombstone:
    """Rows whose `column` is one of `values` are dropped."""

    column: str
    values: list[Any]  # strings or integers
    reason: str
    resolved: list[str]  # shard folders that were looked through
    rows: dict[str, list[int]]  # of those, the folders with such rows -> row numbers inside

    @property
    def name(self) -> str:
        """Its file name: the same values of the same column are one tombstone."""
        return fingerprint([self.column, self.values])[:16] + ".json"


def drop(path: Path, column: str, values: list[Any], reason: str = "") -> Tombstone:
    """Writes the tombstone; from now on no reader that opens the store sees these rows.

    Raises ValueError when no shard has the column or the values are of another type.
    """
    files = open_files(path)
    index = open_index(files)
    if index.folders and not any(column in summary["columns"] for summary in index.summaries):
        known = sorted({name for summary in index.summaries for name in summary["columns"]})
        raise ValueError(f"no shard of {path} has a column {column!r}; there are {known}")
    tombstone = Tombstone(column, sorted(set(values)), reason, [], {})
    write_tombstone(path, resolve(files, tombstone, index.folders))
    note_tombstones(path)
    return tombstone


def read_tombstones(files: StoreFiles) -> list[Tombstone]:
    """All tombstones of a store. Raises ValueError, naming the file, for a damaged one."""
    names = [f"{TOMBSTONES}/{name}" for name in tombstone_names(files)]
    return [Tombstone(**parse_json(files.read(name), f"{files.url}/{name}")) for name in names]


def write_tombstone(path: Path, tombstone: Tombstone) -> None:
    """Writes or replaces a tombstone atomically."""
    (path / TOMBSTONES).mkdir(exist_ok=True)
    write_json(path / TOMBSTONES / tombstone.name, asdict(tombstone))


def resolve(files: StoreFiles, tombstone: Tombstone, folders: list[str]) -> Tombstone:
    """Brings `rows` and `resolved` up to date with these shard folders, in place; returns it."""
    for folder in sorted(set(folders) - set(tombstone.resolved)):
        table = read_parquet(files, f"shards/{folder}/{ROWS}", [tombstone.column])
        if tombstone.column in table.column_names and len(table):
            found = table[tombstone.column]
            try:
                values = pa.array(tombstone.values).cast(found.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ValueError(f"column {tombstone.column} is {found.type}: {error}") from None
            rows = np.flatnonzero(pc.is_in(found, value_set=values))
            if len(rows):
                tombstone.rows[folder] = rows.tolist()
    tombstone.rows = {f: rows for f, rows in sorted(tombstone.rows.items()) if f in set(folders)}
    tombstone.resolved = sorted(folders)
    return tombstone


def dropped_rows(files: StoreFiles, folders: list[str]) -> dict[str, np.ndarray]:
    """Shard folder -> its dropped rows, (n,) int64 ascending; folders without any are left out."""
    found: dict[str, list[int]] = {}
    for tombstone in read_tombstones(files):
        for folder, rows in resolve(files, tombstone, folders).rows.items():
            found[folder] = found.get(folder, []) + rows
    return {folder: np.unique(np.array(rows, np.int64)) for folder, rows in found.items()}
