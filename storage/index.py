"""The index of a store: what every shard's manifest says, in one file, so that opening is quick.

storage/seal.py writes it. It is a cache: a local reader compares it with the listing of shards/ and
reads the manifests of folders that it does not name, so an index is never out of date. A remote
reader, which may not be able to list, sees what was sealed.

STORE/sealed.json               names the index, its sha256, the tombstones
STORE/index-<16 hex>.parquet    one row a shard: INDEX_SCHEMA
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.atomic import atomic_file, json_text, parse_json, read_json, write_json
from storage.files import StoreFiles, open_files
from storage.fingerprint import fingerprint
from storage.progress import Progress, no_progress
from storage.schema import TABLE_SCHEMA, StoreMismatch, read_meta
from storage.shard import MANIFEST, current_folders, split_folder

SEALED, TOMBSTONES = "sealed.json", "tombstones"
INDEX_SCHEMA = pa.schema(
    [
        pa.field("folder", pa.string(), nullable=False),  # below shards/
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("manifest", pa.binary(32), nullable=False),  # sha256 of manifest.json
        pa.field("summary", pa.string(), nullable=False),  # JSON, see summarize
    ]
)


@dataclass
class Index:
    """The current shards of a store, in row order."""

    table: pa.Table  # INDEX_SCHEMA
    sealed: "Index | None" = None  # what it was made from, when shards have come since
    tombstones: tuple[str, ...] = ()  # file names of those that were there when it was sealed

    @cached_property
    def folders(self) -> list[str]:
        """Folder names below shards/."""
        return self.table["folder"].to_pylist()

    @cached_property
    def rows(self) -> np.ndarray:
        """(shards,) int64: rows on disk, dropped ones included."""
        return self.table["rows"].to_numpy()

    @cached_property
    def digest(self) -> str:
        """16 hex digits that stand for these very shards, by folder and manifest."""
        manifests = b"".join(self.table["manifest"].to_pylist())
        return hashlib.sha256("\n".join(self.folders).encode() + manifests).hexdigest()[:16]

    def summary(self, shard: int) -> dict[str, Any]:
        """What `summarize` kept of a shard's manifest."""
        return json.loads(self.table["summary"][shard].as_py())

    @cached_property
    def summaries(self) -> list[dict[str, Any]]:
        """Of all shards; takes about 10 us a shard."""
        return [json.loads(text) for text in self.table["summary"].to_pylist()]


def summarize(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without what only reading the shard's arrays needs."""
    columns = manifest.get("columns") or {field.name: str(field.type) for field in TABLE_SCHEMA}
    content = manifest.get("content") or {c: fingerprint(v) for c, v in manifest["chunks"].items()}
    return {
        "name": manifest["name"],
        "source": manifest["source"],
        "skipped": manifest["skipped"],
        "skip_reasons": manifest["skip_reasons"],
        "columns": columns,
        "content": content,
        "largest_class_id": manifest.get("largest_class_id"),  # None: schema version 1
        "bytes": {name: entry["bytes"] for name, entry in manifest["files"].items()},
    }


def open_index(files: StoreFiles) -> Index:
    """The index as sealed, brought up to date with the shards that can be listed.

    Raises StoreMismatch for a shard of another store, ValueError for damage, a shard that was
    sealed and is missing, or a store that can neither be listed nor is sealed.
    """
    is_local = files.local_path("shards") is not None
    try:
        sealed = read_sealed(files)
    except FileNotFoundError:
        if not is_local:
            raise
        sealed = None  # the manifests say the same
    entries = files.list("shards")
    if sealed is not None and (entries is None or not is_local):
        return sealed
    if entries is None:
        raise ValueError(
            f"{files.url} cannot be listed and is not sealed: run muse-store seal where it lies"
        )
    current = current_folders(entries)
    folders = list(current.values())
    if sealed is None or folders == sealed.folders:
        return sealed or read_index(files, folders)
    if gone := [folder for folder in sealed.folders if split_folder(folder)[0] not in current]:
        raise ValueError(
            f"{files.url}/shards/{gone[0]} was sealed and is missing ({len(gone)} in all): restore "
            "it, encode it again, or run muse-store seal to do without"
        )
    return read_index(files, folders, sealed)


def read_index(
    files: StoreFiles,
    folders: list[str],
    known: Index | None = None,
    progress: Progress = no_progress,
) -> Index:
    """The index of these shard folders, from their manifests where `known` does not have them.

    Raises FileNotFoundError for a folder without manifest; else as open_index.
    """
    store = read_meta(files).fingerprint
    before = dict(zip(known.folders, known.table.to_pylist(), strict=True)) if known else {}

    def row(folder: str) -> dict[str, Any]:
        if folder in before:
            return before[folder]
        path = f"{files.url}/shards/{folder}"
        try:
            content = files.read(f"shards/{folder}/{MANIFEST}")
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"{path}/{MANIFEST} is missing: restore it, or delete {path} and encode it again"
            ) from None
        manifest = parse_json(content, f"{path}/{MANIFEST}")
        if manifest["store"] != store:
            raise StoreMismatch(f"{path} was made for another store: move it to where it belongs")
        if manifest["name"] != split_folder(folder)[0]:
            raise StoreMismatch(f"{path} holds shard {manifest['name']}: rename it back")
        summary = json.dumps(summarize(manifest), separators=(",", ":"))
        digest = hashlib.sha256(content).digest()
        return {"folder": folder, "rows": manifest["rows"], "manifest": digest, "summary": summary}

    with ThreadPoolExecutor(max_workers=1 if files.local_path("shards") else 16) as pool:
        rows = list(progress(pool.map(row, folders), len(folders)))
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    return Index(table, known, known.tombstones if known else ())


def write_index(path: Path, index: Index) -> None:
    """Writes an index and sealed.json, which names it and the tombstones; removes older indexes.

    Others may do the same at once: whoever is last finds sealed.json right, or mends it.
    """
    files, sink = open_files(path), pa.BufferOutputStream()
    pq.write_table(index.table, sink, compression="zstd", use_dictionary=False)
    content = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(content).hexdigest()
    name = f"index-{digest[:16]}.parquet"
    while True:
        if not (path / name).is_file() or (path / name).read_bytes() != content:
            with atomic_file(path / name) as temporary:
                temporary.write_bytes(content)
        sealed = {"index": name, "sha256": digest, "rows": int(index.rows.sum())}
        sealed["tombstones"] = tombstone_names(files)
        if not (path / SEALED).is_file() or (path / SEALED).read_text() != json_text(sealed):
            write_json(path / SEALED, sealed)
        for entry in path.iterdir():
            if is_index_file(entry.name) and entry.name != name:
                entry.unlink(missing_ok=True)
        found = read_json(path / SEALED)
        if (path / found["index"]).is_file() and found["tombstones"] == tombstone_names(files):
            return


def listed_folders(files: StoreFiles) -> list[str]:
    """The folders below shards/ that count now, in row order; of a store that can be listed."""
    return list(current_folders(files.list("shards") or []).values())


def read_sealed(files: StoreFiles) -> Index | None:
    """The index as it was sealed; None for a store that is not.

    Raises ValueError for damage, FileNotFoundError when sealed.json names an index that is gone.
    """
    for _ in range(3):
        try:
            sealed = parse_json(files.read(SEALED), f"{files.url}/{SEALED}")
        except FileNotFoundError:
            return None
        try:
            content = files.read(sealed["index"])
        except FileNotFoundError:
            continue  # sealed anew just now
        if hashlib.sha256(content).hexdigest() != sealed["sha256"]:
            name = f"{files.url}/{sealed['index']}"
            raise ValueError(f"{name} is damaged: run muse-store seal again, or delete {SEALED}")
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            return Index(file.read(), tombstones=tuple(sealed["tombstones"]))
    name = f"{files.url}/{sealed['index']}"
    raise FileNotFoundError(f"{name} is missing: run muse-store seal again, or delete {SEALED}")


def tombstone_names(files: StoreFiles) -> list[str]:
    """File names of the tombstones; over http those that were there when it was sealed."""
    listed = files.list(TOMBSTONES)
    if listed is None:
        listed = parse_json(files.read(SEALED), f"{files.url}/{SEALED}")["tombstones"]
    return sorted(name for name in listed if name.endswith(".json") and name[0] != ".")


def index_problems(path: Path) -> list[str]:
    """What is wrong with the index of a store, as sentences; [] for one that is not sealed."""
    if not (path / SEALED).is_file():
        return []
    try:
        sealed = read_sealed(open_files(path))
    except (ValueError, OSError) as error:
        return [str(error)]
    assert sealed is not None
    current = current_folders([entry.name for entry in (path / "shards").iterdir()])
    listed = tombstone_names(open_files(path))
    problems = [
        f"{path}/{TOMBSTONES}/{name} is missing: restore it, or run muse-store seal to do without"
        for name in sealed.tombstones
        if name not in listed
    ]
    for folder, digest in zip(sealed.folders, sealed.table["manifest"].to_pylist(), strict=True):
        name = split_folder(folder)[0]
        if name not in current:
            problems.append(f"{path}/shards/{folder} is missing: restore it, or encode it again")
            continue
        manifest = path / "shards" / folder / MANIFEST
        if current[name] == folder and manifest.is_file():
            if hashlib.sha256(manifest.read_bytes()).digest() != digest:
                changed = f"{path}/shards/{folder} is not the shard that was sealed"
                problems.append(f"{changed}: restore it, or run muse-store seal again")
    return problems


def is_index_file(name: str) -> bool:
    """Whether a file name in a store's folder is that of an index."""
    return name.startswith("index-") and name.endswith(".parquet")
