"""Sealing a store: writing its index, and in its tombstones which rows they drop.

After that no reader has to look into the shards to open the store (storage/index.py).
"""

from pathlib import Path

from storage.files import open_files
from storage.index import Index, listed_folders, open_index, read_index, write_index
from storage.progress import Progress, no_progress
from storage.tombstones import read_tombstones, resolve, write_tombstone


def seal(path: Path, progress: Progress = no_progress) -> Index:
    """Writes the index of all shards that exist now, read anew; safe to repeat, race and kill."""
    files, index, folders = open_files(path), None, None
    while folders != (current := listed_folders(files)):  # others may add or rewrite shards
        folders = current
        try:
            index = read_index(files, folders, index, progress)
            _note(path, index)
            write_index(path, index)
        except FileNotFoundError:
            if folders == listed_folders(files):
                raise
    assert index is not None
    return index


def note_shards(path: Path) -> None:
    """Notes in every tombstone which rows of the shards that exist now it drops."""
    _note(path, open_index(open_files(path)))


def _note(path: Path, index: Index) -> None:
    files = open_files(path)
    for tombstone in read_tombstones(files):
        if tombstone.resolved != index.digest:
            write_tombstone(path, resolve(files, [tombstone], index)[0])
