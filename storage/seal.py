"""Sealing a store: writing its index, and in its tombstones which rows they drop.

After that no reader has to look into the shards to open the store (storage/index.py).
"""

from pathlib import Path

from storage.files import open_files
from storage.index import Index, open_index, read_index, write_index
from storage.progress import Progress, no_progress
from storage.shard import current_folders
from storage.tombstones import read_tombstones, resolve, write_tombstone


def seal(path: Path, progress: Progress = no_progress) -> Index:
    """Writes the index of all shards that exist now, read anew; safe to repeat, race and kill."""
    files = open_files(path)
    folders = list(current_folders(files.list("shards") or []).values())
    index = read_index(files, folders, progress=progress)
    _note(path, index)
    write_index(path, index)
    return index


def note_shards(path: Path) -> None:
    """Notes in every tombstone which rows of the shards that exist now it drops."""
    _note(path, open_index(open_files(path)))


def _note(path: Path, index: Index) -> None:
    files = open_files(path)
    for tombstone in read_tombstones(files):
        if tombstone.resolved != index.digest:
            write_tombstone(path, resolve(files, [tombstone], index)[0])
