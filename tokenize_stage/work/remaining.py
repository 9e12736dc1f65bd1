"""Which shards are still to do, and whether the finished ones were made from the same input."""

import os
from collections.abc import Sequence
from pathlib import Path

from storage.files import StoreFiles, open_files
from storage.shard import current_folders, read_manifest, read_rows, read_skipped
from tokenize_stage.sources.input_shards import InputShard
from tokenize_stage.sources.sample import stored_key


def remaining_shards(store: Path, shards: Sequence[InputShard]) -> list[InputShard]:
    """The shards that the store does not hold yet, in order; reads manifests of these alone.

    Raises ValueError when a finished shard has the name of one of `shards` but was made from
    something else (another tar of that name, or a folder whose files have changed since): left
    alone, that data would be missing from the store without a word.
    """
    files = open_files(store)
    folders = current_folders(files.list("shards") or [])
    for shard in shards:
        if shard.name in folders:
            _check_same_input(files, shard, f"shards/{folders[shard.name]}")
    return [shard for shard in shards if shard.name not in folders]


def _check_same_input(files: StoreFiles, shard: InputShard, folder: str) -> None:
    manifest = read_manifest(files, folder)
    if shard.files is None:
        source = manifest["source"]
        if os.path.abspath(source) != os.path.abspath(shard.source):
            raise ValueError(
                f"shard {shard.name} of {files.url} was made from {source}, not from "
                f"{shard.source}; if the data has only moved give its old path (a link will do), "
                "else rename the tar or choose another store.path"
            )
        return
    stored = {*read_rows(files, folder, manifest, ["key"])["key"].to_pylist()}
    stored |= {*read_skipped(files, folder, manifest)["key"].to_pylist()}
    changed = sorted(stored ^ {stored_key(path) for path, _ in shard.files})
    if changed:
        raise ValueError(
            f"{shard.source} is not what shard {shard.name} of {files.url} was made from: "
            f"{len(changed)} files differ, {changed[0]} first; choose another store.path"
        )
