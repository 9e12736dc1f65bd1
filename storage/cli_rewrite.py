"""muse-store drop, compact, append-column: what changes a store in place (storage/cli.py)."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.append_column import append_columns, read_values
from storage.progress import progress_bar
from storage.reader import TokenStore
from storage.rewrite import compact_store, plan_compaction, stale_folders
from storage.shard import read_manifest, read_rows
from storage.tombstones import Tombstone, resolve
from storage.tombstones import drop as write_drop

SHOWN = 10  # of a list of keys


def drop(args: argparse.Namespace) -> int:
    """Drops the rows that have one of these values: from now on no reader that opens the store
    sees them. The values also hold for shards that come later. compact removes them from disk."""
    store = TokenStore(args.store)
    values = _drop_values(store, args)
    tombstone = Tombstone(args.column, values, args.reason)
    resolve(store.files, [tombstone], store.index)
    new = {}  # shard name -> (rows dropped now, rows)
    for shard, name in enumerate(store.shards):
        rows = tombstone.rows.get(store.index.folders[shard], [])
        gone = store.numbers.dropped_in(shard)
        dropped = len(rows if gone is None else np.setdiff1d(rows, gone))
        if dropped:
            new[name] = (dropped, int(np.diff(store.numbers.bounds)[shard]))
    count = sum(dropped for dropped, _ in new.values())
    unknown = _found_nowhere(store, tombstone)
    if not args.dry_run:
        write_drop(args.store, args.column, values, args.reason)
    if args.json:
        shards = {name: dropped for name, (dropped, _) in new.items()}
        print(json.dumps({"rows": count, "shards": shards, "found_nowhere": unknown}))
        return 0
    for name, (dropped, total) in new.items():
        print(f"{name}: {dropped:,} of {total:,} rows")
    word = "would drop" if args.dry_run else "dropped"
    print(f"{word} {count:,} of {len(store):,} rows in {len(new)} shards")
    if unknown:
        print(f"{len(unknown)} values stand in no row: {_some(unknown)}; noted for later shards")
    if not args.dry_run:
        print(f"wrote {args.store}/tombstones/{tombstone.name}")
        print(f"next: muse-store compact {args.store} removes them from disk")
    return 0


def compact(args: argparse.Namespace) -> int:
    """Rewrites the shards that hold dropped rows without them, and removes superseded shards.
    Readers that have the store open may have to open it again. The rows join the rejected
    samples, as `dropped`."""
    store, started = TokenStore(args.store), time.monotonic()
    plan, stale = plan_compaction(store), stale_folders(args.store)
    stale += [args.store / "shards" / step.folder for step in plan]
    word = "would " if args.dry_run else ""
    for step in plan:
        facts = f"{step.rows:,} rows, {step.dropped:,} dropped, {step.size_bytes:,} bytes"
        print(f"{word}rewrite {step.folder} as {step.new_folder}: {facts}")
    for folder in stale:
        print(f"{word}remove {folder.relative_to(args.store)}: {_bytes(folder):,} bytes")
    if not args.dry_run:
        compact_store(args.store, progress_bar("compact"))
    rows, size = sum(step.rows for step in plan), sum(step.size_bytes for step in plan)
    speed = "" if args.dry_run else rate(rows, size, started)
    print(f"{args.store}: {len(plan)} shards, {rows:,} rows, {size:,} bytes{speed}")
    return 0


def append_column(args: argparse.Namespace) -> int:
    """Adds columns to the rows of a store without rewriting the codes: those of files with a column
    `key` (and `source`, where one key stands for samples of several sources). Rows without a value
    get null. A column that exists is refused, or replaced wholly with --replace."""
    if bool(args.files) == bool(args.shards_dir):
        raise ValueError("give either files or --shards-dir")
    values: Any
    if args.files:
        values = read_values(args.files)
    else:
        values = {path.stem: path for path in sorted(args.shards_dir.iterdir())}
        if not values:
            raise FileNotFoundError(f"no files in {args.shards_dir}")
    started, bar = time.monotonic(), progress_bar("append-column")
    report = append_columns(args.store, values, args.replace, args.dry_run, bar)
    word = "would " if args.dry_run else ""
    for folder in report.rewritten:
        print(f"{word}write the next version of {folder}")
    print(f"{args.store}: {', '.join(report.columns)}: {report.rows:,} rows", end="")
    print(f", {len(report.rewritten)} shards {word}change, {report.unchanged} have it", end="")
    print("" if args.dry_run else rate(report.rows, 0, started))
    if report.without:
        print(f"{report.without:,} rows get no value (null)")
    if report.unused:
        print(f"{len(report.unused):,} values belong to no row: {_some(report.unused)}")
    return 0


def rate(rows: int, size_bytes: int, started: float) -> str:
    """ ", 1.2 s, 3,400 rows/s, 5.6 MB/s" since time.monotonic() was `started`."""
    seconds = time.monotonic() - started
    speed = f", {size_bytes / seconds / 1e6:,.1f} MB/s" if size_bytes else ""
    return f", {seconds:.1f} s, {rows / seconds:,.0f} rows/s{speed}"


def _drop_values(store: TokenStore, args: argparse.Namespace) -> list[Any]:
    """Values from the command line and the file, sorted, as integers for an integer column."""
    lines = args.file.read_text().splitlines() if args.file else []
    texts = {*(args.values or []), *(line.strip() for line in lines)} - {""}
    if not texts:
        raise ValueError("no values: give some, or --file with one a line")
    if args.column not in store.columns:
        raise ValueError(f"no column {args.column!r}; there are {', '.join(store.columns)}")
    if "int" not in store.columns[args.column]:
        return sorted(texts)
    return sorted(int(text) for text in texts)


def _found_nowhere(store: TokenStore, tombstone: Tombstone) -> list[Any]:
    found: set[Any] = set()
    for folder, rows in tombstone.rows.items():
        manifest = read_manifest(store.files, f"shards/{folder}")
        table = read_rows(store.files, f"shards/{folder}", manifest, [tombstone.column])
        found.update(pc.unique(table[tombstone.column].take(pa.array(rows))).to_pylist())
    return [value for value in tombstone.values if value not in found]


def _some(values: list[Any]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (" …" if len(values) > SHOWN else "")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
