"""Merging stores: their shards side by side in one new store, linked, neither copied nor decoded.

Only shards that hold dropped rows are written anew, without them. A run that was killed is
finished by running it again.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.atomic import atomic_directory, json_text
from storage.files import open_files
from storage.index import open_index
from storage.new_store import Part, part_origin, plan_parts, unknown_tombstones, write_part
from storage.progress import Progress, for_each, no_progress
from storage.reader import TokenStore
from storage.rewrite import link_files, remove_stale
from storage.schema import StoreMismatch, first_difference
from storage.seal import seal
from storage.shard import MANIFEST
from storage.tombstones import Tombstone, resolve, write_tombstone
from storage.writer import create_store, expect_shards, finished_shards


@dataclass(frozen=True)
class Merged:
    """A shard of the merged store and where it comes from."""

    store: TokenStore
    shard: int
    part: Part  # its rows, under its new name
    origin: str
    manifest: dict[str, Any] | None  # that it will have; None: it has dropped rows, is made anew

    def is_like(self, manifest: dict[str, Any]) -> bool:
        """Whether a shard with this manifest is this one."""
        if self.manifest is None:
            return manifest.get("origin") == self.origin
        return manifest == self.manifest


def plan_merge(stores: list[TokenStore], prefix: bool = False) -> list[Merged]:
    """The shards of all stores, in name order; one that two stores share stands there once.

    prefix: puts the store's folder name before every shard's name. Raises StoreMismatch, naming
    the field, for stores that differ, ValueError for two shards of one name.
    """
    plan: dict[str, Merged] = {}
    for store in stores:
        _check_alike(stores[0], store)
        for shard, part in enumerate(plan_parts(store, None)):
            part = dataclasses.replace(part, name=_prefix(store, prefix) + part.name)
            is_whole = store.numbers.dropped_in(shard) is None
            manifest = store.manifest(shard) | {"name": part.name} if is_whole else None
            merged = Merged(store, shard, part, part_origin(store, part), manifest)
            other = plan.setdefault(part.name, merged)
            if (other.manifest, other.origin) != (merged.manifest, merged.origin):
                raise ValueError(
                    f"{other.store.path} and {store.path} both have a shard {part.name}, and not "
                    "the same one: --prefix puts the store's name before it"
                )
    return [plan[name] for name in sorted(plan)]


def merge_stores(
    out: Path, stores: list[TokenStore], prefix: bool = False, progress: Progress = no_progress
) -> list[Tombstone]:
    """Writes the shards of all stores as one; returns the tombstones that are not taken along.

    Those are the ones that would drop rows of another store than theirs. Raises ValueError when
    `out` holds something else, and what plan_merge raises.
    """
    plan = {merged.part.name: merged for merged in plan_merge(stores, prefix)}
    version = min(store.meta.schema_version for store in stores)
    create_store(out, dataclasses.replace(stores[0].meta, schema_version=version))
    finished = finished_shards(out)
    for name, manifest in finished.items():
        if name not in plan or not plan[name].is_like(manifest):
            raise ValueError(
                f"{out}/shards/{name} was made from something else: give another folder"
            )
    missing = [_prefix(store, prefix) + name for store in stores for name in store.missing_shards()]
    expect_shards(out, [*plan, *missing])

    def write(merged: Merged) -> None:
        if merged.manifest is None:
            write_part(merged.store, out, merged.store.meta, merged.part, merged.origin)
            return
        old = Path(merged.store.path) / "shards" / merged.store.index.folders[merged.shard]
        with atomic_directory(out / "shards" / merged.part.name) as folder:
            link_files(old, folder, merged.manifest["files"])
            (folder / MANIFEST).write_text(json_text(merged.manifest))

    for_each(write, [plan[name] for name in plan if name not in finished], progress)
    left = _carry_tombstones(out, [found for store in stores for found in store.tombstones])
    seal(out)
    remove_stale(out)
    return left


def _carry_tombstones(out: Path, tombstones: list[Tombstone]) -> list[Tombstone]:
    """Writes those that drop no row of the store `out`; returns the others."""
    left, files = [], open_files(out)
    index = open_index(files)
    for tombstone in unknown_tombstones(out, tombstones):
        if resolve(files, [tombstone], index)[0].rows:
            left.append(tombstone)
        else:
            write_tombstone(out, tombstone)
    return left


def _check_alike(first: TokenStore, other: TokenStore) -> None:
    backend, chunk_rows = first.meta.backend, first.meta.chunk_rows
    same_layout = dataclasses.replace(other.meta, backend=backend, chunk_rows=chunk_rows)
    if difference := first_difference(first.meta, same_layout):
        raise StoreMismatch(f"{first.path} and {other.path} differ in {difference}: not mergeable")
    if difference := first_difference(first.meta, other.meta):
        raise StoreMismatch(
            f"{first.path} and {other.path} differ in {difference}: first run muse-store convert "
            f"{other.path} NEW --backend {backend} --chunk-rows {chunk_rows}"
        )


def _prefix(store: TokenStore, prefix: bool) -> str:
    return f"{Path(store.path).resolve().name}-" if prefix else ""
