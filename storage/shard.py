"""One shard on disk: its files, its manifest, and checking them.

A shard is immutable and exists only as a whole: storage/writer.py makes the folder under another
name and renames it. The manifest lists every file with its sha256 (what `muse-store verify`
compares) and the crc32c of every chunk of decoded rows and every table column (what a reader
compares).

A shard that is rewritten becomes a new folder, NAME@v2, NAME@v3 and so on, again by one rename;
the highest version is the shard, and those below it are what its writer has yet to remove.
"""

import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import crc32c
import numpy as np
import pyarrow as pa

from storage import arrow_array, zarr_array
from storage.atomic import json_text, parse_json
from storage.files import StoreFiles
from storage.fingerprint import file_sha256, fingerprint
from storage.parquet_file import read_parquet, write_parquet
from storage.schema import SKIPPED_SCHEMA, StoreMeta

BACKENDS: dict[str, ModuleType] = {"zarr": zarr_array, "arrow": arrow_array}
MANIFEST, ROWS, SKIPPED = "manifest.json", "rows.parquet", "skipped.parquet"
VERSION = re.compile(r"(.+)@v([1-9][0-9]*)")


def split_folder(folder: str) -> tuple[str, int]:
    """(name, version) of a shard folder: "a" is ("a", 1), "a@v3" is ("a", 3)."""
    match = VERSION.fullmatch(folder) if "@" in folder else None
    return (match[1], int(match[2])) if match else (folder, 1)


def current_folders(entries: list[str]) -> dict[str, str]:
    """Shard name -> its folder of the highest version, in name order, from a listing of shards/."""
    newest: dict[str, tuple[int, str]] = {}
    for entry in entries:
        if not entry.startswith("."):
            name, version = split_folder(entry)
            newest[name] = max(newest.get(name, (0, "")), (version, entry))
    return {name: newest[name][1] for name in sorted(newest)}


def write_shard(
    folder: Path,
    meta: StoreMeta,
    header: dict[str, Any],
    arrays: dict[str, np.ndarray],
    table: pa.Table,
    skipped: pa.Table,
) -> None:
    """Fills the empty directory `folder` with a shard, its manifest last."""
    for column, array in arrays.items():
        path = folder / f"{column}.{meta.backend}"
        BACKENDS[meta.backend].write_array(path, array, meta.chunk_rows)
    chunks = {name: chunk_checksums(array, meta.chunk_rows) for name, array in arrays.items()}
    finish_shard(folder, meta, header, chunks, table, skipped)


def finish_shard(
    folder: Path,
    meta: StoreMeta,
    header: dict[str, Any],
    chunks: dict[str, list[int]],
    table: pa.Table,
    skipped: pa.Table,
    linked: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Adds the tables and the manifest to a folder that holds the array columns already.

    linked: entries of the manifest for files that are another version's, so that damage to them
    since then is not signed anew.
    """
    tables = {ROWS: table, SKIPPED: skipped} if len(skipped) else {ROWS: table}
    parquet = {name: write_parquet(folder / name, content) for name, content in tables.items()}
    manifest = {
        **header,
        "store": meta.fingerprint,
        "rows": len(table),
        "skipped": len(skipped),
        "skip_reasons": dict(sorted(Counter(map(_kind, skipped["reason"].to_pylist())).items())),
        "columns": {field.name: str(field.type) for field in table.schema},
        "largest_class_id": _largest(table["class_id"]),
        "chunks": chunks,
        "content": {name: fingerprint(checksums) for name, checksums in chunks.items()},
        "parquet": parquet,
        "files": {
            name: (linked or {}).get(name)
            or {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in shard_files(folder)
            for name in [path.relative_to(folder).as_posix()]
        },
    }
    if meta.backend == "arrow":
        offsets = {c: arrow_array.data_offset(folder / f"{c}.arrow") for c in meta.arrays}
        manifest["offsets"] = offsets
    (folder / MANIFEST).write_text(json_text(manifest))


def read_manifest(files: StoreFiles, folder: str) -> dict[str, Any]:
    """The manifest of the shard in `folder`. Raises ValueError when it is damaged."""
    name = f"{folder}/{MANIFEST}"
    return parse_json(files.read(name), f"{files.url}/{name}")


def read_rows(
    files: StoreFiles,
    folder: str,
    manifest: dict[str, Any],
    columns: list[str] | None = None,
    rows: np.ndarray | None = None,
) -> pa.Table:
    """Columns of a shard's rows.parquet. Raises ValueError when damaged.

    A name in `columns` that the file lacks is left out. rows: places on disk (n,); None: all.
    """
    return read_parquet(files, folder, ROWS, manifest, columns, rows)


def read_skipped(files: StoreFiles, folder: str, manifest: dict[str, Any]) -> pa.Table:
    """The rejected samples of a shard (key, source, reason); empty where there are none."""
    if not manifest["skipped"]:
        return SKIPPED_SCHEMA.empty_table()
    return read_parquet(files, folder, SKIPPED, manifest, None)


def shard_files(folder: Path) -> list[Path]:
    """The data files of a shard directory (all but the manifest), sorted."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path != folder / MANIFEST)


def chunk_checksums(array: np.ndarray, chunk_rows: int) -> list[int]:
    """crc32c of every block of `chunk_rows` rows (little-endian, C order)."""
    array = np.ascontiguousarray(array)
    starts = range(0, len(array), chunk_rows)
    return [crc32c.crc32c(array[start : start + chunk_rows].data) for start in starts]


def _largest(class_ids: pa.ChunkedArray) -> int:
    """The largest class id; -1 when there is none."""
    return max((value for value in class_ids.unique().to_pylist() if value is not None), default=-1)


def _kind(reason: str) -> str:
    """The class of a reason, for counting: what stands before the first colon."""
    return reason.split(":", 1)[0]
