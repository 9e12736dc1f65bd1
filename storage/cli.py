"""muse-store: look into a token store and check it (`python -m storage.cli` is the same).

muse-store info STORE            what it holds, from the manifests
muse-store verify STORE          reads every byte; exit status 1 when anything is damaged
muse-store stats STORE           codebook usage, perplexity, classes; also as STORE/stats.png
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from storage.reader import TokenStore
from storage.stats import class_histogram, codebook_usage, draw_stats, store_sizes
from storage.verify import verify_store


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status (0 good, 1 damaged, 2 unusable)."""
    parser = argparse.ArgumentParser(
        prog="muse-store", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action in {"info": info, "verify": verify, "stats": stats}.items():
        command = commands.add_parser(name, help=(action.__doc__ or "").splitlines()[0])
        command.add_argument("store", type=Path, help="the store's directory")
        command.set_defaults(action=action)
        if name != "verify":
            command.add_argument("--json", action="store_true", help="print one JSON object")
        if name == "stats":
            command.add_argument("--png", type=Path, help="where to draw (STORE/stats.png)")
    args = parser.parse_args(argv)
    try:
        return args.action(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def info(args: argparse.Namespace) -> int:
    """What a store holds: tokenizers, rows, bytes, bits a code."""
    store = TokenStore(args.store)
    facts = {"store": str(store.path), "backend": store.meta.backend, **store_sizes(store)}
    facts["resolution"] = store.meta.resolution
    facts["fingerprint"] = store.meta.fingerprint
    facts["tokenizers"] = {name: vars(t) for name, t in store.meta.tokenizers.items()}
    if args.json:
        print(json.dumps(facts))
        return 0
    print(f"{store.path}: {facts['rows']:,} rows in {facts['shards']} shards ({facts['backend']})")
    for name, tokenizer in store.meta.tokenizers.items():
        h, w = tokenizer.grid
        print(f"  {name}: {h}x{w} of {tokenizer.codebook_size} by {tokenizer.name}")
        if name in facts["bits_per_code"]:
            print(f"    {facts['bits_per_code'][name]:.3f} bits a code on disk")
    for name, size in facts["bytes"].items():
        print(f"  {name:<12} {size:>16,} bytes  {size / max(1, len(store)):>9.1f} a row")
    print(f"  skipped: {facts['skipped']:,}  {facts['skip_reasons'] or ''}")
    print(f"  fingerprint: {facts['fingerprint']}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Reads every byte of every shard; prints what is damaged or missing."""

    def bar(items: Iterable[Any], total: int) -> Iterable[Any]:
        return tqdm(items, total=total, desc="verify", unit="shard", disable=None)

    problems = verify_store(args.store, bar)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problems")
        return 1
    store = TokenStore(args.store)
    print(f"{args.store}: {len(store.shards)} shards, {len(store):,} rows, whole")
    return 0


def stats(args: argparse.Namespace) -> int:
    """Codebook usage and perplexity, class histogram; reads all codes, draws a PNG."""
    store = TokenStore(args.store)
    facts: dict[str, Any] = store_sizes(store)
    usages = {column: codebook_usage(store, column) for column in store.meta.tokenizers}
    facts["codebook"] = {
        column: {key: value for key, value in usage.items() if key != "counts"}
        for column, usage in usages.items()
    }
    facts["classes"] = class_histogram(store)
    picture = args.png or args.store / "stats.png"
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


if __name__ == "__main__":
    sys.exit(main())
