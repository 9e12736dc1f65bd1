"""Dropped rows: a tombstone names them by a column's values, and every reader leaves them out.

STORE/tombstones/<16 hex>.json    column, values, reason; and which rows of which shard folders
                                  these are, so that opening the store reads no column

The values stay in force for shards that come later: a reader finds their rows by itself, `seal`
and `compact` note them. `compact` rewrites the shards without the rows.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.atomic import parse_json, write_json
from storage.files import StoreFiles, open_files
from storage.fingerprint import fingerprint
from storage.index import (
    SEALED,
    TOMBSTONES,
    Index,
    listed_folders,
    open_index,
    tombstone_names,
    write_index,
)
from storage.schema import raise_version
from storage.shard import read_manifest, read_rows


@dataclass
class Tombstone:
    """Rows whose `column` is one of `values` are dropped."""

    column: str
    values: list[Any]  # strings or integers
    reason: str
    resolved: str = ""  # Index.digest of the shards that were looked through
    rows: dict[str, list[int]] = field(default_factory=dict)  # folder -> its such rows, if any

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
    tombstone = Tombstone(column, sorted(set(values)), reason)
    while True:
        write_tombstone(path, *resolve(files, [tombstone], index))
        if files.exists(SEALED):
            write_index(path, index)
        if listed_folders(files) == index.folders:
            return tombstone
        index = open_index(files)  # others have added shards, and may have sealed them


def read_tombstones(files: StoreFiles) -> list[Tombstone]:
    """All tombstones of a store. Raises ValueError, naming the file, for a damaged one."""
    names = [f"{TOMBSTONES}/{name}" for name in tombstone_names(files)]
    return [Tombstone(**parse_json(files.read(name), f"{files.url}/{name}")) for name in names]


def write_tombstone(path: Path, tombstone: Tombstone) -> None:
    """Writes or replaces a tombstone atomically."""
    raise_version(path)
    (path / TOMBSTONES).mkdir(exist_ok=True)
    write_json(path / TOMBSTONES / tombstone.name, asdict(tombstone))


def resolve(files: StoreFiles, tombstones: list[Tombstone], index: Index) -> list[Tombstone]:
    """Brings `rows` and `resolved` up to date with the shards of `index`, in place; returns them.

    Reads the columns of shards only where `resolved` stands for others.
    """
    stale = [tombstone for tombstone in tombstones if tombstone.resolved != index.digest]
    if not stale:
        return tombstones
    before = index.sealed
    known = set(before.folders).intersection(index.folders) if before else set()
    blank = [found for found in stale if not before or found.resolved != before.digest]
    for tombstone in stale:
        kept = set() if tombstone in blank else known
        tombstone.rows = {f: rows for f, rows in tombstone.rows.items() if f in kept}
    for folder in index.folders:
        _find_rows(files, blank if folder in known else stale, folder)
    for tombstone in stale:
        tombstone.resolved = index.digest
    return tombstones


def dropped_rows(
    files: StoreFiles, tombstones: list[Tombstone], index: Index
) -> dict[str, np.ndarray]:
    """Shard folder -> its dropped rows, (n,) int64 ascending; folders without any are left out.

    Raises ValueError when a tombstone is gone that was there when the store was sealed.
    """
    gone = sorted(set(index.tombstones) - {tombstone.name for tombstone in tombstones})
    if gone:
        raise ValueError(
            f"{files.url}/{TOMBSTONES}/{gone[0]} is missing ({len(gone)} in all): restore it, or "
            "run muse-store seal to do without"
        )
    found: dict[str, list[int]] = {}
    for tombstone in resolve(files, tombstones, index):
        for folder, rows in tombstone.rows.items():
            found[folder] = found.get(folder, []) + rows
    return {folder: np.unique(np.array(rows, np.int64)) for folder, rows in found.items()}


def _find_rows(files: StoreFiles, tombstones: list[Tombstone], folder: str) -> None:
    """Adds the rows of one shard that these tombstones drop."""
    columns = sorted({tombstone.column for tombstone in tombstones})
    if not columns:
        return
    manifest = read_manifest(files, f"shards/{folder}")
    table = read_rows(files, f"shards/{folder}", manifest, columns)
    for tombstone in tombstones:
        if tombstone.column in table.column_names and len(table):
            found = table[tombstone.column]
            try:
                values = pa.array(tombstone.values).cast(found.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ValueError(f"column {tombstone.column} is {found.type}: {error}") from None
            rows = np.flatnonzero(pc.is_in(found, value_set=values))
            if len(rows):
                tombstone.rows[folder] = rows.tolist()
