"""Rows in, one shard out: create_store, ShardWriter.

    with ShardWriter(store, "00000", source="laion/00000.tar") as writer:
        writer.add({"codes": codes, "key": keys, "class_id": class_ids})
        writer.skip("000000017", "not an image: cannot identify image file")

Leaving the block commits the shard by one rename; an exception (or kill -9) leaves nothing.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from storage.atomic import atomic_directory, parse_json, read_json, write_json
from storage.files import StoreFiles, open_files
from storage.schema import (
    SKIPPED_SCHEMA,
    TABLE_SCHEMA,
    StoreMeta,
    StoreMismatch,
    check_codes,
    first_difference,
    read_meta,
    write_meta,
)
from storage.shard import MANIFEST, current_folders, split_folder, write_shard

EXPECTED = "expected.json"


def create_store(path: str | Path, meta: StoreMeta) -> StoreMeta:
    """Makes the store, or opens one that was made with the same meta; safe to race.

    Raises StoreMismatch naming the first differing field when the store holds something else.
    """
    path = Path(path)
    (path / "shards").mkdir(parents=True, exist_ok=True)
    if not (path / "store.json").is_file():
        write_meta(path, meta)
    existing = read_meta(path)
    difference = first_difference(existing, meta)
    if difference:
        raise StoreMismatch(f"{path} differs from this run in {difference}; choose another store")
    return existing


def finished_shards(path: str | Path) -> dict[str, dict[str, Any]]:
    """Manifests of the shards that exist, by name, sorted; of each the newest version."""
    shards = Path(path) / "shards"
    folders = current_folders(os.listdir(shards) if shards.is_dir() else [])
    return {name: read_json(shards / folder / MANIFEST) for name, folder in folders.items()}


def expect_shards(path: str | Path, names: list[str]) -> None:
    """Notes which shards a store is to have, beside those noted before; `verify` compares.

    Every task of a run notes the same names, so it does not matter who is last.
    """
    noted = expected_shards(path)
    if not noted.issuperset(names):
        write_json(Path(path) / EXPECTED, {"shards": sorted(noted.union(names))})


def expected_shards(store: str | Path | StoreFiles) -> set[str]:
    """The names noted by expect_shards; empty for a store where nobody did."""
    files = open_files(store) if isinstance(store, str | Path) else store
    try:
        return set(parse_json(files.read(EXPECTED), f"{files.url}/{EXPECTED}")["shards"])
    except FileNotFoundError:
        return set()


class ShardWriter:
    """Collects rows in memory and writes them as one shard on leaving the `with` block."""

    def __init__(
        self,
        path: str | Path,
        name: str,
        source: str,
        extra_columns: pa.Schema | None = None,
    ):
        """extra_columns: of the table, beside TABLE_SCHEMA.

        Raises ValueError for a name that cannot be a folder or an extra column that exists.
        """
        if not name or name.startswith(".") or "/" in name or split_folder(name)[0] != name:
            raise ValueError(f"shard name {name!r}: a folder's, without '/', leading dot, @v2 …")
        self.path, self.name, self.source = Path(path), name, source
        self.meta = read_meta(self.path)
        extra = list(extra_columns or [])
        taken = [f.name for f in extra if f.name in [*TABLE_SCHEMA.names, *self.meta.arrays]]
        if taken:
            raise ValueError(f"extra columns {taken} are columns of every store")
        self.schema = pa.schema([*TABLE_SCHEMA, *extra])
        self.rows = 0
        self._arrays: dict[str, list[np.ndarray]] = {column: [] for column in self.meta.arrays}
        self._tables: list[pa.Table] = []
        self._skipped: list[dict[str, str]] = []

    @property
    def skipped(self) -> int:
        """How many samples were rejected so far."""
        return len(self._skipped)

    def add(self, columns: dict[str, Any]) -> None:
        """Appends rows: every array column of the store, and any columns of the table.

        `key` is required; `source` is filled in; what is not given is null. Raises ValueError
        for an unknown or missing column, unequal lengths, or a code outside the codebook.
        """
        unknown = set(columns) - set(self._arrays) - set(self.schema.names)
        missing = (set(self._arrays) | {"key"}) - set(columns)
        if unknown or missing:
            raise ValueError(f"columns: unknown {sorted(unknown)}, missing {sorted(missing)}")
        count = len(columns["key"])
        lengths = {name: len(values) for name, values in columns.items() if len(values) != count}
        if lengths:
            raise ValueError(f"{count} keys, but {lengths}")
        for name, parts in self._arrays.items():
            tokenizer = self.meta.tokenizers.get(name)
            size = tokenizer.codebook_size if tokenizer else None
            parts.append(check_codes(np.asarray(columns[name]), self.meta.arrays[name], size))
        table = {"source": [self.source] * count, **columns}
        fields = [
            pa.array(table[f.name], f.type) if f.name in table else pa.nulls(count, f.type)
            for f in self.schema
        ]
        self._tables.append(pa.Table.from_arrays(fields, schema=self.schema))
        self.rows += count

    def add_table(self, arrays: dict[str, np.ndarray], table: pa.Table) -> None:
        """Appends rows whose table columns, `source` too, come as a pyarrow Table."""
        self.add({**arrays, **{name: table[name].combine_chunks() for name in table.column_names}})

    def skip(self, key: str, reason: str) -> None:
        """Records a rejected sample; `reason` reads `kind: detail`, and kinds are counted."""
        self._skipped.append({"key": key, "source": self.source, "reason": reason})

    def commit(self) -> None:
        """Writes the shard; when another process has finished it meanwhile, that one stays."""
        arrays = {
            name: np.concatenate(parts) if parts else _no_rows(self.meta, name)
            for name, parts in self._arrays.items()
        }
        table = pa.concat_tables([self.schema.empty_table(), *self._tables]).combine_chunks()
        skipped = pa.Table.from_pylist(self._skipped, schema=SKIPPED_SCHEMA)
        header = {"name": self.name, "source": self.source}
        with atomic_directory(self.path / "shards" / self.name) as folder:
            write_shard(folder, self.meta, header, arrays, table, skipped)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()


def _no_rows(meta: StoreMeta, column: str) -> np.ndarray:
    return np.empty((0, *meta.arrays[column].shape), meta.arrays[column].dtype)
