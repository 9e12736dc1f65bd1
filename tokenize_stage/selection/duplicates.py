"""The file of duplicates: written by `muse-tokenize dedup`, read by each task for its own shards.

A Parquet file, one row a duplicate, sorted by `shard`: what it repeats stands in `of_shard` and
`of_key`, `kind` says whether the bytes are the same (exact) or the pictures look alike (near).
`image_hash` is the first half of 16 hex digits of its sha256, so that a sample whose bytes have
changed since the scan is no duplicate. The schema's metadata lists the shards that were scanned.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from storage.atomic import atomic_file

SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("shard", "key", "image_hash")]
    + [pa.field(name, pa.string(), nullable=False) for name in ("kind", "of_shard", "of_key")]
)
ROW_GROUP = 1 << 16  # rows that a task reads for one of its shards, at least
SHARDS = b"shards"  # key in the schema's metadata
HASH_DIGITS = 16


class Duplicate(NamedTuple):
    """What a sample repeats; kind: exact or near."""

    kind: str
    of_shard: str
    of_key: str


def write_duplicates(path: Path, table: pa.Table, shards: list[str]) -> None:
    """Writes rows of SCHEMA, sorted by shard; shards: all that were scanned."""
    table = table.replace_schema_metadata({SHARDS: json.dumps(shards)})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP)


class Duplicates:
    """A file of duplicates, of which only the rows of one shard are in memory at a time."""

    def __init__(self, path: str):
        """Raises FileNotFoundError, or ValueError for a file that dedup did not write."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"filters.duplicates={path} does not exist; muse-tokenize scan, then "
                "muse-tokenize dedup, make it"
            )
        schema = pq.read_schema(path)
        if schema.names != SCHEMA.names or SHARDS not in (schema.metadata or {}):
            raise ValueError(f"filters.duplicates={path} was not written by muse-tokenize dedup")
        self._path = path
        self._shards = frozenset(json.loads(schema.metadata[SHARDS]))

    def refuse_unscanned(self, names: Iterable[str]) -> None:
        """Raises ValueError for shards of which it is not known what is a duplicate."""
        if missing := sorted({*names} - self._shards):
            raise ValueError(
                f"filters.duplicates={self._path}: {len(missing)} shards were not scanned, "
                f"{missing[0]} first; run muse-tokenize scan for all shards, then dedup again"
            )

    def of_shard(self, name: str) -> dict[tuple[str, str], Duplicate]:
        """The duplicates in a shard, by key and the first HASH_DIGITS of image_hash."""
        table = pq.read_table(self._path, filters=[("shard", "==", name)])
        rows = zip(*(table[column].to_pylist() for column in SCHEMA.names[1:]), strict=True)
        return {(key, digest): Duplicate(*of) for key, digest, *of in rows}
