"""Rewriting shards in place: every rewritten shard is a new version of it, made by one rename.

compact_store leaves out the dropped rows; storage/append_column.py adds columns. Both begin by
finding what is still to do, so that a run that was killed is finished by running it again, and
both end with `settle`: tombstones and index up to date, what is superseded removed.
"""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.atomic import atomic_directory
from storage.index import SEALED
from storage.progress import Progress, for_each, no_progress
from storage.reader import TokenStore
from storage.schema import SKIPPED_SCHEMA, raise_version
from storage.seal import note_shards, seal
from storage.shard import (
    MANIFEST,
    current_folders,
    read_rows,
    read_skipped,
    split_folder,
    write_shard,
)


@dataclass(frozen=True)
class Compaction:
    """A shard that holds dropped rows: the folder it has, the one it will have."""

    shard: int
    folder: str
    new_folder: str
    rows: int  # on disk
    dropped: int
    size_bytes: int


def plan_compaction(store: TokenStore) -> list[Compaction]:
    """The shards that compact_store rewrites."""
    plan = []
    for shard, folder in enumerate(store.index.folders):
        dropped = store.numbers.dropped_in(shard)
        if dropped is not None:
            rows, size = int(store.index.rows[shard]), shard_bytes(store, shard)
            step = Compaction(shard, folder, next_version(folder), rows, len(dropped), size)
            plan.append(step)
    return plan


def compact_store(path: Path, progress: Progress = no_progress) -> list[Compaction]:
    """Rewrites every shard with dropped rows without them, and removes what is superseded.

    The dropped rows join the shard's rejected samples, with the reason of their tombstone. Raises
    ValueError when another command rewrites the same shard meanwhile.
    """
    store = TokenStore(path)
    plan = plan_compaction(store)

    def rewrite(step: Compaction) -> None:
        first, end = store.numbers.bounds[step.shard : step.shard + 2]
        rows, columns = slice(first, end), list(store.index.summary(step.shard)["columns"])
        arrays = {column: store.read_codes(rows, column) for column in store.meta.arrays}
        skipped = rejected_samples(store, step.shard)
        with new_version(store, step.shard) as folder:
            header = shard_header(store, step.shard)
            write_shard(folder, store.meta, header, arrays, store.table(columns, rows), skipped)

    for_each(rewrite, plan, progress)
    settle(path)
    return plan


def rejected_samples(store: TokenStore, shard: int) -> pa.Table:
    """A shard's rejected samples and, after them, its dropped rows as such (SKIPPED_SCHEMA)."""
    folder, manifest = store.index.folders[shard], store.manifest(shard)
    skipped = read_skipped(store.files, f"shards/{folder}", manifest)
    dropped = store.numbers.dropped_in(shard)
    if dropped is None:
        return skipped
    table = read_rows(store.files, f"shards/{folder}", manifest, ["key", "source"]).take(dropped)
    reasons: dict[int, str] = {}
    for tombstone in store.tombstones:
        reason = f"dropped: {tombstone.reason or f'by {tombstone.column}'}"
        reasons = dict.fromkeys(tombstone.rows.get(folder, []), reason) | reasons
    columns = [
        table["key"],
        table["source"].fill_null(""),
        pa.chunked_array([[reasons[row] for row in dropped.tolist()]]),
    ]
    return pa.concat_tables([skipped, pa.table(columns, schema=SKIPPED_SCHEMA)])


@contextmanager
def new_version(store: TokenStore, shard: int) -> Iterator[Path]:
    """Yields an empty folder; on success it becomes the next version of the shard.

    Raises ValueError when another command was first: then nothing was rewritten.
    """
    folder = next_version(store.index.folders[shard])
    shards, manifest = Path(store.path) / "shards", b""
    raise_version(Path(store.path))
    with atomic_directory(shards / folder) as temporary:
        yield temporary
        manifest = (temporary / MANIFEST).read_bytes()
    current = current_folders(os.listdir(shards))[split_folder(folder)[0]]
    if current != folder or (shards / folder / MANIFEST).read_bytes() != manifest:
        raise ValueError(f"{shards / current} was made meanwhile by another command: run again")


def link_files(old: Path, new: Path, names: Iterable[str]) -> None:
    """Gives files of one shard folder to another: by a hard link, or else as copies."""
    for name in names:
        target = new / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old / name, target)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            shutil.copyfile(old / name, target)


def settle(path: Path) -> None:
    """Brings tombstones and index (of a sealed store) up to date, then removes what is stale."""
    if (path / SEALED).is_file():
        seal(path)
    else:
        note_shards(path)
    remove_stale(path)


def remove_stale(path: Path) -> None:
    """Removes the stale_folders of a store; one that others read is moved away first, whole."""
    staging = path / "shards" / ".staging"
    for folder in stale_folders(path):
        if folder.parent != staging:
            staging.mkdir(exist_ok=True)
            moved = staging / f"{folder.name}.{uuid.uuid4().hex}"
            with suppress(FileNotFoundError):  # another command removes it
                os.rename(folder, moved)
            folder = moved
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not there, or another writer is at work
        staging.rmdir()


def stale_folders(path: Path) -> list[Path]:
    """Superseded versions of shards, and what killed writers of shards that exist left."""
    shards = path / "shards"
    entries = [entry.name for entry in shards.iterdir()]
    current = current_folders(entries)
    stale = [shards / e for e in entries if e[0] != "." and e not in current.values()]
    with suppress(FileNotFoundError):  # nobody writes
        for entry in os.listdir(shards / ".staging"):
            name, version = split_folder(entry.rpartition(".")[0])
            if name in current and version <= split_folder(current[name])[1]:
                stale.append(shards / ".staging" / entry)
    return sorted(stale)


def next_version(folder: str) -> str:
    """The folder of a shard's version after this one."""
    name, version = split_folder(folder)
    return f"{name}@v{version + 1}"


def shard_bytes(store: TokenStore, shard: int) -> int:
    """What the files of a shard take, manifest not counted."""
    return sum(store.index.summary(shard)["bytes"].values())


def shard_header(store: TokenStore, shard: int) -> dict[str, Any]:
    """What a shard's manifest says of where its rows came from; every version says the same."""
    manifest = store.manifest(shard)
    return {key: manifest[key] for key in ("name", "source", "origin") if key in manifest}
