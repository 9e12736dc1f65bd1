"""muse-store info, ls, verify, seal, stats: what looks into a store (storage/cli.py runs them)."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from storage.index import read_sealed
from storage.progress import progress_bar
from storage.reader import TokenStore
from storage.rewrite import shard_bytes
from storage.schema import read_meta
from storage.seal import seal as seal_store
from storage.shard import current_folders
from storage.stats import class_histogram, codebook_usage, column_sizes, draw_stats, store_sizes
from storage.verify import verify_shard, verify_store

ENTROPY_ROWS = 65_536  # read for `info`
CELL = 48  # characters of a value that `ls` shows


def info(args: argparse.Namespace) -> int:
    """What a store holds, from its index: rows, tokenizers, bits a code, bytes of every column."""
    store = TokenStore(args.store)
    facts: dict[str, Any] = {"store": str(args.store), **store_sizes(store)}
    facts["sealed"] = read_sealed(store.files) is not None
    facts["missing"] = len(store.missing_shards())
    facts |= {"backend": store.meta.backend, "chunk_rows": store.meta.chunk_rows}
    facts |= {"resolution": store.meta.resolution, "fingerprint": store.meta.fingerprint}
    facts["tokenizers"] = {name: vars(t) for name, t in store.meta.tokenizers.items()}
    usages = {c: codebook_usage(store, c, ENTROPY_ROWS) for c in store.meta.tokenizers}
    facts["entropy_bits"] = {column: usage["entropy_bits"] for column, usage in usages.items()}
    facts["entropy_rows"] = {column: usage["rows"] for column, usage in usages.items()}
    facts["column_bytes"], facts["column_shards"] = column_sizes(store)
    if args.json:
        print(json.dumps(facts))
    else:
        _print_info(facts)
    return 0


def ls(args: argparse.Namespace) -> int:
    """The shards of a store; or the rows of one shard, or those for which a filter holds."""
    store = TokenStore(args.store)
    if args.shard is None and args.where is None:
        entries = [_shard_facts(store, shard) for shard in range(len(store.shards))]
    else:
        entries = _row_facts(store, args)
    if args.json:
        for entry in entries:
            print(json.dumps(entry, default=str))
        return 0
    for line in [list(entries[0]), *(list(entry.values()) for entry in entries)] if entries else []:
        print("\t".join(map(_cell, line)))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Reads every byte of a store; prints what is damaged or missing, and exits with status 1."""
    if args.shard is None:
        problems = verify_store(args.store, progress_bar("verify"))
    else:
        meta, shards = read_meta(args.store), args.store / "shards"
        folders = current_folders([entry.name for entry in shards.iterdir()])
        if args.shard not in folders:
            raise ValueError(f"no shard {args.shard!r} in {args.store}; muse-store ls lists them")
        problems = verify_shard(shards / folders[args.shard], meta.fingerprint)
    if args.json:
        print(json.dumps({"problems": problems}))
        return 1 if problems else 0
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problems")
        return 1
    if args.shard is not None:
        print(f"{args.store}: shard {args.shard}, whole")
        return 0
    store = TokenStore(args.store)
    print(f"{args.store}: {len(store.shards)} shards, {len(store):,} rows, whole")
    return 0


def seal(args: argparse.Namespace) -> int:
    """Writes the index of a store, so that it opens at once, over http too. Safe to repeat; a
    sealed store can still grow: local readers see new shards, remote ones after the next seal."""
    sealed = seal_store(args.store, progress_bar("seal"))
    print(f"{args.store}: sealed {len(sealed.folders)} shards, {int(sealed.rows.sum()):,} rows")
    return 0


def stats(args: argparse.Namespace) -> int:
    """Codebook usage, perplexity and entropy, rows by class: reads all codes, draws a PNG."""
    store = TokenStore(args.store)
    if args.png is None and store.files.local_path("store.json") is None:
        raise ValueError(f"{args.store} is not a folder: say with --png where to draw")
    facts: dict[str, Any] = store_sizes(store)
    usages = {column: codebook_usage(store, column) for column in store.meta.tokenizers}
    facts["codebook"] = {
        column: {key: value for key, value in usage.items() if key != "counts"}
        for column, usage in usages.items()
    }
    facts["classes"] = class_histogram(store)
    picture = args.png or Path(args.store) / "stats.png"
    draw_stats(store, picture, usages)
    if args.json:
        print(json.dumps(facts))
        return 0
    print(f"{store.path}: {facts['rows']:,} rows, {sum(facts['bytes'].values()):,} bytes")
    for column, usage in facts["codebook"].items():
        size = store.meta.tokenizers[column].codebook_size
        bits = facts["bits_per_code"].get(column, float("nan"))
        print(f"  {column}: {usage['used']} of {size} codes used, ", end="")
        print(f"perplexity {usage['perplexity']:.1f}, ", end="")
        print(f"entropy {usage['entropy_bits']:.3f} bits, {bits:.3f} bits a code on disk")
    shown = list(facts["classes"].items())[:20]
    print("  classes: " + ", ".join(f"{c}: {n:,}" for c, n in shown), end="")
    print(f" … {len(facts['classes'])} in all" if len(facts["classes"]) > 20 else "")
    print(f"  picture: {picture}")
    return 0


def _print_info(facts: dict[str, Any]) -> None:
    sealed = "sealed" if facts["sealed"] else "not sealed"
    print(
        f"{facts['store']}: {facts['rows']:,} rows in {facts['shards']:,} shards, "
        f"{facts['backend']}, chunks of {facts['chunk_rows']} rows, {sealed}"
    )
    for name, found in (("dropped", "rows, still on disk"), ("missing", "shards, expected")):
        if facts[name]:
            print(f"  {name}: {facts[name]:,} {found}")
    print(f"  skipped: {facts['skipped']:,}  {facts['skip_reasons'] or ''}")
    for name, tokenizer in facts["tokenizers"].items():
        h, w = tokenizer["grid"]
        print(f"  {name}: {h}x{w} of {tokenizer['codebook_size']} by {tokenizer['name']}")
        if name in facts["bits_per_code"]:
            print(f"    {facts['bits_per_code'][name]:.3f} bits a code on disk; entropy ", end="")
            print(f"{facts['entropy_bits'][name]:.3f}, from {facts['entropy_rows'][name]:,} rows")
    rows = max(1, facts["rows"] + facts["dropped"])
    print(f"  {'file':<20} {'bytes':>16} {'a row':>10}")
    for name, size in facts["bytes"].items():
        print(f"  {name:<20} {size:>16,} {size / rows:>10.2f}")
    print(f"  columns of rows.parquet, from {facts['column_shards']} of {facts['shards']} shards")
    for name, size in facts["column_bytes"].items():
        print(f"    {name:<18} {size:>16,} {size / rows:>10.2f}")
    print(f"  fingerprint: {facts['fingerprint']}")


def _shard_facts(store: TokenStore, shard: int) -> dict[str, Any]:
    dropped, rows = store.numbers.dropped_in(shard), np.diff(store.numbers.bounds)[shard]
    return {
        "shard": store.shards[shard],
        "folder": store.index.folders[shard],
        "rows": int(rows),
        "dropped": 0 if dropped is None else len(dropped),
        "skipped": store.index.summary(shard)["skipped"],
        "bytes": shard_bytes(store, shard),
    }


def _row_facts(store: TokenStore, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The first --rows rows of a shard, or of a store, for which --where holds."""
    rows = np.arange(len(store)) if args.where is None else store.rows_where(args.where)
    if args.shard is not None:
        if args.shard not in store.shards:
            raise ValueError(f"no shard {args.shard!r} in {args.store}; muse-store ls lists them")
        first, end = store.numbers.bounds[store.shards.index(args.shard) :][:2]
        rows = rows[(rows >= first) & (rows < end)]
    rows = rows[: args.rows]
    columns = args.columns.split(",") if args.columns else list(store.columns)
    table = store.to_arrow(columns, rows)
    if not args.columns:
        table = table.select([n for n in columns if table[n].null_count < len(table)])
    entries = table.to_pylist()
    return [{"row": row, **entry} for row, entry in zip(rows.tolist(), entries, strict=True)]


def _cell(value: Any) -> str:
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= CELL else f"{text[: CELL - 1]}…"
