"""One shard on disk: its files, its manifest, and reading them back with every check made.

A shard is immutable and exists only as a whole: storage/writer.py makes the directory under
another name and renames it. The manifest lists every file with its sha256 (what `muse-store
verify` compares) and the crc32c of every chunk of decoded rows (what a reader compares).
"""

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import arrow_array, zarr_array
from storage.atomic import json_text, read_json
from storage.fingerprint import file_sha256
from storage.schema import SKIPPED_SCHEMA, StoreMeta

BACKENDS: dict[str, ModuleType] = {"zarr": zarr_array, "arrow": arrow_array}
MANIFEST, ROWS, SKIPPED = "manifest.json", "rows.parquet", "skipped.parquet"


def write_shard(
    folder: Path,
    meta: StoreMeta,
    header: dict[str, Any],
    arrays: dict[str, np.ndarray],
    table: pa.Table,
    skipped: pa.Table,
) -> None:
    """Fills the empty directory `folder` with a shard, its manifest last."""
    backend = BACKENDS[meta.backend]
    for column, array in arrays.items():
        backend.write_array(folder / f"{column}.{meta.backend}", array, meta.chunk_rows)
    pq.write_table(table, folder / ROWS, compression="zstd", write_page_checksum=True)
    if len(skipped):
        pq.write_table(skipped, folder / SKIPPED, compression="zstd", write_page_checksum=True)
    manifest = {
        **header,
        "store": meta.fingerprint,
        "rows": len(table),
        "skipped": len(skipped),
        "skip_reasons": dict(sorted(Counter(map(_kind, skipped["reason"].to_pylist())).items())),
        "chunks": {name: chunk_checksums(a, meta.chunk_rows) for name, a in arrays.items()},
        "files": {
            str(path.relative_to(folder)): {
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
            for path in shard_files(folder)
        },
    }
    (folder / MANIFEST).write_text(json_text(manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard directory. Raises ValueError when it is damaged."""
    return read_json(folder / MANIFEST)


def read_array(folder: Path, meta: StoreMeta, manifest: dict[str, Any], column: str) -> np.ndarray:
    """An array column (rows, ...), every chunk checked against the manifest.

    Raises ValueError naming the file (and the rows) when any bit of it has changed.
    """
    path = folder / f"{column}.{meta.backend}"
    array = BACKENDS[meta.backend].read_array(path)
    wanted = meta.arrays[column]
    if list(array.shape) != [manifest["rows"], *wanted.shape] or array.dtype != wanted.dtype:
        raise ValueError(f"{path} is damaged: it holds {array.dtype}{list(array.shape)}")
    found = chunk_checksums(array, meta.chunk_rows)
    for index, pair in enumerate(zip(found, manifest["chunks"][column], strict=True)):
        if pair[0] != pair[1]:
            first = index * meta.chunk_rows
            raise ValueError(f"{path} is damaged in rows {first}..{first + meta.chunk_rows - 1}")
    return array


def read_table(folder: Path, columns: list[str] | None = None) -> pa.Table:
    """Columns of rows.parquet, page checksums verified. Raises ValueError when damaged."""
    return _read_parquet(folder / ROWS, columns)


def read_skipped(folder: Path) -> pa.Table:
    """The rejected samples of a shard (key, source, reason); empty where there are none."""
    path = folder / SKIPPED
    return _read_parquet(path, None) if path.is_file() else SKIPPED_SCHEMA.empty_table()


def verify_shard(folder: Path) -> list[str]:
    """Everything that is wrong with a shard directory, as sentences; [] when it is whole."""
    try:
        manifest = read_manifest(folder)
    except (ValueError, OSError) as error:
        return [str(error)]
    problems = []
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != wanted["bytes"] or file_sha256(path) != wanted["sha256"]:
            problems.append(f"{path} is damaged: its sha256 is not the manifest's")
    extra = {str(path.relative_to(folder)) for path in shard_files(folder)}
    problems += [
        f"{folder / name} is not in the manifest" for name in extra - set(manifest["files"])
    ]
    return problems


def shard_files(folder: Path) -> list[Path]:
    """The data files of a shard directory (all but the manifest), sorted."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path != folder / MANIFEST)


def chunk_checksums(array: np.ndarray, chunk_rows: int) -> list[int]:
    """crc32c of every block of `chunk_rows` rows (little-endian, C order)."""
    starts = range(0, len(array), chunk_rows)
    return [google_crc32c.value(array[start : start + chunk_rows].tobytes()) for start in starts]


def _read_parquet(path: Path, columns: list[str] | None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is damaged or lacks a column: {error}") from None


def _kind(reason: str) -> str:
    """The class of a reason, for counting: what stands before the first colon."""
    return reason.split(":", 1)[0]
