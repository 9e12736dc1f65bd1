"""muse-store merge, split, convert: what makes new stores out of old ones (storage/cli.py)."""

import argparse
import time
from pathlib import Path

from storage.cli_rewrite import rate
from storage.merge import merge_stores, plan_merge
from storage.new_store import convert_store, plan_parts, split_store
from storage.progress import progress_bar
from storage.reader import TokenStore
from storage.rewrite import shard_bytes
from storage.writer import finished_shards


def merge(args: argparse.Namespace) -> int:
    """Makes one store of several with the same fingerprint, backend and chunk size: their shards
    side by side, as links where the file system has them. Dropped rows are left out."""
    stores, started = [TokenStore(path) for path in args.stores], time.monotonic()
    plan = plan_merge(stores, args.prefix)
    anew = sum(merged.manifest is None for merged in plan)
    rows = sum(merged.part.end - merged.part.first for merged in plan)
    print(f"{len(stores)} stores: {len(plan)} shards, {rows:,} rows, {anew} shards written anew")
    if args.dry_run:
        return _say(stores, args.out, [merged.part.name for merged in plan])
    for tombstone in merge_stores(args.out, stores, args.prefix, progress_bar("merge")):
        print(
            f"not taken along: {tombstone.name}, which would drop rows of another store "
            f"by {tombstone.column}; muse-store drop {args.out} does that"
        )
    return _wrote(args.out, started)


def split(args: argparse.Namespace) -> int:
    """Makes two stores of one: the samples chosen by a hash of source and key (all views of one
    together, whatever the shards), or the rows for which a filter holds; and the others."""
    if args.fraction is not None and not 0 < args.fraction < 1:
        raise ValueError(f"--fraction {args.fraction}: wanted is above 0 and below 1")
    store, started = TokenStore(args.store), time.monotonic()
    outs = (args.out_a, args.out_b)
    if args.dry_run:
        names = store.shards
        return max(_say([store], out, names) for out in outs)
    split_store(store, outs, args.fraction, args.seed, args.where, progress_bar("split"))
    return max(_wrote(out, started) for out in outs)


def convert(args: argparse.Namespace) -> int:
    """Copies a store to another backend, chunk size or shard size. Codes stay as they are, dropped
    rows are left out, all else goes along. The new store is sealed."""
    store, started = TokenStore(args.store), time.monotonic()
    if args.dry_run:
        names = [part.name for part in plan_parts(store, args.rows_per_shard)]
        return _say([store], args.out, names)
    bar = progress_bar("convert")
    convert_store(store, args.out, args.backend, args.chunk_rows, args.rows_per_shard, bar)
    return _wrote(args.out, started)


def _say(stores: list[TokenStore], out: Path, names: list[str]) -> int:
    finished = len(finished_shards(out).keys() & set(names))
    size = sum(shard_bytes(store, shard) for store in stores for shard in range(len(store.shards)))
    dropped = sum(len(store.numbers.dropped) for store in stores)
    rows = sum(map(len, stores))
    print(
        f"would write {out}: {len(names)} shards ({finished} are there), from {rows:,} rows, "
        f"{dropped:,} dropped ones left out, {size:,} bytes"
    )
    return 0


def _wrote(out: Path, started: float) -> int:
    store = TokenStore(out)
    size = sum(shard_bytes(store, shard) for shard in range(len(store.shards)))
    print(
        f"wrote {out}: {len(store.shards)} shards, {len(store):,} rows, {size:,} bytes"
        + rate(len(store), size, started)
    )
    return 0
