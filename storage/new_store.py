"""New stores out of old ones: convert (backend, chunk size, shard size), split, merge.

A plan says which rows go to which new shard; every shard is made whole or not at all, and says in
its manifest's `origin` what it is made from, so that a run that was killed is finished by running
it again, and a folder that holds something else is refused. Dropped rows are left out (they join
the rejected samples); tombstones, rejected samples and further columns go along.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage.atomic import atomic_directory
from storage.files import open_files
from storage.fingerprint import fingerprint
from storage.index import tombstone_names
from storage.progress import Progress, for_each, no_progress
from storage.reader import TokenStore
from storage.rewrite import rejected_samples, remove_stale
from storage.schema import SCHEMA_VERSION, SKIPPED_SCHEMA, Backend, StoreMeta
from storage.seal import seal
from storage.shard import write_shard
from storage.tombstones import Tombstone, write_tombstone
from storage.writer import create_store, expect_shards, finished_shards

Choose = Callable[[pa.Table, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class Part:
    """A shard to be made out of rows [first, end) of a store.

    Of the old shards `rejected` the rejected samples and dropped rows go along.
    """

    name: str
    source: str
    first: int
    end: int
    rejected: tuple[int, ...]
    columns: tuple[str, ...]  # of the table


def plan_parts(store: TokenStore, rows_per_shard: int | None) -> list[Part]:
    """A part for every shard; or parts of `rows_per_shard` rows, which cut and join shards."""
    bounds = store.numbers.bounds.tolist()
    if rows_per_shard is None:
        return [
            Part(s["name"], s["source"], first, end, (shard,), tuple(s["columns"]))
            for shard, (s, (first, end)) in enumerate(
                zip(store.index.summaries, itertools.pairwise(bounds), strict=True)
            )
        ]
    if missing := store.missing_shards():
        raise ValueError(
            f"{store.path} lacks shards {missing[:3]} … ({len(missing)}), which nobody could tell "
            "from shards of other sizes: make them first, or keep the shards as they are"
        )
    starts = np.arange(0, max(1, len(store)), rows_per_shard)
    owner = np.clip(np.searchsorted(starts, bounds[:-1], side="right") - 1, 0, None)
    content = store.content_fingerprint(next(iter(store.meta.arrays)))[:16]
    width = max(5, len(str(len(starts) - 1)))
    return [
        Part(
            f"{number:0{width}d}",
            f"rows {first}.. of {content}",
            first,
            min(first + rows_per_shard, len(store)),
            tuple(np.flatnonzero(owner == number).tolist()),
            tuple(store.columns),
        )
        for number, first in enumerate(starts.tolist())
    ]


def convert_store(
    store: TokenStore,
    out: Path,
    backend: Backend | None = None,
    chunk_rows: int | None = None,
    rows_per_shard: int | None = None,
    progress: Progress = no_progress,
) -> None:
    """Writes the rows of a store as another one; None keeps what the store has.

    Raises StoreMismatch or ValueError when `out` holds something else.
    """
    meta = dataclasses.replace(
        store.meta,
        backend=backend or store.meta.backend,
        chunk_rows=chunk_rows or store.meta.chunk_rows,
        schema_version=SCHEMA_VERSION,
    )
    parts = plan_parts(store, rows_per_shard)
    names = [part.name for part in parts]
    write_parts(store, out, meta, parts, names + store.missing_shards(), progress=progress)


def split_store(
    store: TokenStore,
    outs: tuple[Path, Path],
    fraction: float | None = None,
    seed: int = 0,
    where: str | None = None,
    progress: Progress = no_progress,
) -> None:
    """Writes two stores: the samples chosen by a hash, or by a filter, and the rest.

    By hash (choose_by_hash), all views of a sample come to one side, as do rejected samples;
    by filter, rejected samples go with the rest.
    """
    choose = choose_by_hash(fraction or 0.0, seed) if where is None else choose_rows(store, where)
    meta = dataclasses.replace(store.meta, schema_version=SCHEMA_VERSION)
    parts, recipe = plan_parts(store, None), [fraction, seed, where]
    names = [part.name for part in parts] + store.missing_shards()
    for side, out in enumerate(outs):

        def keep(table: pa.Table, rows: np.ndarray | None, side: int = side) -> np.ndarray:
            return choose(table, rows) != bool(side)

        write_parts(store, out, meta, parts, names, [*recipe, side], keep, progress)


def choose_by_hash(fraction: float, seed: int) -> Choose:
    """About `fraction` of all samples, by sha256 of seed, source and key: of each alone."""
    end = round(fraction * 2**64)

    def choose(table: pa.Table, rows: np.ndarray | None) -> np.ndarray:
        sources = table["source"].fill_null("").to_pylist()
        pairs = zip(sources, table["key"].to_pylist(), strict=True)
        digests = (hashlib.sha256(f"{seed}\n{source}\n{key}".encode()) for source, key in pairs)
        chosen = (int.from_bytes(digest.digest()[:8], "big") < end for digest in digests)
        return np.fromiter(chosen, bool, len(table))

    return choose


def choose_rows(store: TokenStore, where: str) -> Choose:
    """The rows for which a filter holds; no rejected sample."""
    wanted = store.rows_where(where)

    def choose(table: pa.Table, rows: np.ndarray | None) -> np.ndarray:
        if rows is None:
            return np.zeros(len(table), bool)
        return np.isin(rows, wanted, assume_unique=True)

    return choose


def write_parts(
    store: TokenStore,
    out: Path,
    meta: StoreMeta,
    parts: list[Part],
    expected: list[str],
    recipe: list[Any] | None = None,
    choose: Choose | None = None,
    progress: Progress = no_progress,
) -> None:
    """Makes the store `out` of these parts, leaving alone those that are there, and seals it.

    recipe: what `choose` depends on. Raises StoreMismatch or ValueError when `out` holds
    something else.
    """
    create_store(out, meta)
    origins = {part.name: part_origin(store, part, recipe) for part in parts}
    finished = finished_shards(out)
    for name, manifest in finished.items():
        if name not in origins or manifest.get("origin") != origins[name]:
            raise ValueError(
                f"{out}/shards/{name} was made from something else: give another folder"
            )
    expect_shards(out, expected)

    def write(part: Part) -> None:
        write_part(store, out, meta, part, origins[part.name], choose)

    for_each(write, [part for part in parts if part.name not in finished], progress)
    for tombstone in unknown_tombstones(out, store.tombstones):
        write_tombstone(out, tombstone)
    seal(out)
    remove_stale(out)


def write_part(
    store: TokenStore,
    out: Path,
    meta: StoreMeta,
    part: Part,
    origin: str,
    choose: Choose | None = None,
) -> None:
    """Writes one shard of a new store."""
    rows = np.arange(part.first, part.end)
    table = store.table(list(part.columns), rows)
    rejected = [rejected_samples(store, shard) for shard in part.rejected]
    skipped = pa.concat_tables([SKIPPED_SCHEMA.empty_table(), *rejected])
    if choose is not None:
        chosen = choose(table, rows)
        rows, table = rows[chosen], table.filter(chosen)
        skipped = skipped.filter(choose(skipped, None))
    arrays = {column: store.read_codes(rows, column) for column in meta.arrays}
    header = {"name": part.name, "source": part.source, "origin": origin}
    with atomic_directory(out / "shards" / part.name) as folder:
        write_shard(folder, meta, header, arrays, table, skipped)


def unknown_tombstones(out: Path, tombstones: list[Tombstone]) -> list[Tombstone]:
    """Those that the store `out` lacks, without the rows that they drop elsewhere."""
    known = tombstone_names(open_files(out))
    return [Tombstone(t.column, t.values, t.reason) for t in tombstones if t.name not in known]


def part_origin(store: TokenStore, part: Part, recipe: list[Any] | None = None) -> str:
    """sha256 of all that a part is made of: the old shards, the rows dropped from them, which."""
    bounds = store.numbers.bounds
    shards = set(part.rejected).union(
        np.flatnonzero((bounds[1:] > part.first) & (bounds[:-1] < part.end)).tolist()
    )
    inputs = []
    for shard in sorted(shards):
        dropped = store.numbers.dropped_in(shard)
        manifest = store.index.table["manifest"][shard].as_py().hex()
        inputs.append([manifest, [] if dropped is None else dropped.tolist()])
    return fingerprint([dataclasses.asdict(part), inputs, recipe])
