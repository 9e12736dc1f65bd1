"""Rows a second of the loader beside other loaders and the machine's limits, in one table.

    pip install -e '.[bench]' && python -m train_stage.bench loader [--only WORD] [--json FILE]

Batches of 256 shuffled rows of 256 codes with their labels, page cache warm, one torch thread.
Before a way is timed, an epoch of a small set must bring every row once with its own label.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import packages_distributions, version
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from storage.reader import TokenStore
from storage.schema import ArrayColumn, StoreMeta, Tokenizer
from storage.writer import ShardWriter, create_store
from train_stage.benchmarks.limits import BATCH, Pair, memory_copy_gb_s, native_gather, numpy_take
from train_stage.benchmarks.measure import (
    CODEBOOK,
    CODES,
    EPOCHS,
    REPETITIONS,
    Result,
    Way,
    Writer,
    in_child,
    measure_all,
    memory_growth_mb,
)
from train_stage.benchmarks.peers import PEERS, SHARDS, WRITERS, pieces
from train_stage.benchmarks.tables import at_least, at_most, head
from train_stage.loading.loader import TokenLoader
from train_stage.loading.store_stream import Reading


def write_store(folder: Path, codes: np.ndarray, labels: np.ndarray, backend: str) -> None:
    """A store of SHARDS shards."""
    tokenizer = Tokenizer("none", "none", CODEBOOK, [1, codes.shape[1]], "0" * 64)
    arrays = {"codes": ArrayColumn("uint16", [codes.shape[1]])}
    meta = StoreMeta(256, arrays, {"codes": tokenizer}, backend=backend)  # type: ignore[arg-type]
    create_store(folder, meta)
    for shard, (some, classes) in enumerate(pieces(codes, labels, SHARDS)):
        with ShardWriter(folder, f"{shard:05d}", source="random") as writer:
            keys = [f"{shard:03d}{row:010d}" for row in range(len(some))]
            writer.add({"codes": some, "key": keys, "class_id": classes})


def token_loader(folder: Path, reading: Reading, narrow: bool) -> Iterator[Pair]:
    """Ours."""
    for batch in TokenLoader(TokenStore(folder), BATCH, reading=reading, narrow=narrow):
        yield batch.codes, batch.class_ids


def our_way(backend: str, reading: Reading, narrow: bool) -> Way:
    """TokenLoader in one of its settings."""
    read = partial(token_loader, reading=reading, narrow=narrow)
    settings = f"preload {reading.preload}, {reading.shuffle}, {dtype_name(narrow)}"
    return Way(f"TokenLoader {backend}, {settings}", backend, read, "yes", narrow=narrow)


def dtype_name(narrow: bool) -> str:
    """What a batch's codes are."""
    return "uint16" if narrow else "int64"


STORES: dict[str, Writer] = {
    backend: partial(write_store, backend=backend) for backend in ("zarr", "arrow")
}
RAM = Reading(preload="ram")
IN_PLACE = Reading(preload="none")
WINDOW = Reading(shuffle="window", window_chunks=64, preload="none")
LIMITS = [
    Way(f"{name}, {dtype_name(narrow)}", "raw", partial(read, narrow=narrow), "-", narrow=narrow)
    for name, read in (("native gather in C", native_gather), ("np.take", numpy_take))
    for narrow in (False, True)
]
OURS = [
    our_way(backend, reading, narrow)
    for backend, readings in (("zarr", [RAM, WINDOW]), ("arrow", [RAM, IN_PLACE, WINDOW]))
    for reading in readings
    for narrow in (False, True)
]
NATIVE = [way.name for way in LIMITS[:2]]  # int64, uint16
BEST = [way.name for way in OURS[:2]]  # zarr, preload ram, full shuffle
PEER_TARGETS = [("torchdata", False, 3.0)] + [
    (module, narrow, 50.0)
    for module in ("litdata", "streaming", "datasets", "webdataset")
    for narrow in (False, True)
]
FLAT_MB = 8.0  # growth that counts as none


def bench_loader(options: argparse.Namespace) -> None:
    """Writes the sets, checks and times every way, prints the table and the targets."""
    ways = [way for way in LIMITS + OURS + PEERS if is_chosen(way, options.only)]
    with tempfile.TemporaryDirectory() as folder:
        writers = {**WRITERS, **STORES}
        results = measure_all(ways, writers, Path(folder), options.rows, options.seconds)
        ours = measure_ours(results, Path(folder, "full"), options.rows)
    rates = {each.way.name: median(each.rows_per_s) for each in results if each.rows_per_s}
    tables = [*table(results, rates), "", *loader_targets(results, rates, ours)]
    print("\n".join([*heading(options, ours), "", *tables]))
    if options.json:
        numbers = [{**vars(result), "way": result.way.name} for result in results]
        record = {"rows": options.rows, **ours, "ways": numbers}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def is_chosen(way: Way, words: list[str]) -> bool:
    """Whether the way's name has one of the words, or there are none."""
    return not words or any(word.lower() in way.name.lower() for word in words)


def measure_ours(results: list[Result], full: Path, rows: int) -> dict[str, Any]:
    """The machine's copying speed, and what is asked of our loader beside its rate."""
    growth = {}
    for way in (result.way for result in results if result.rows_per_s):
        if way in OURS and not way.narrow:
            growth[way.name] = in_child(memory_growth_mb, way, full / way.form, rows)
            print(f"{way.name}: {growth[way.name]:.1f} MB in {EPOCHS} epochs", file=sys.stderr)
    numbers = {"memory_copy_gb_s": in_child(memory_copy_gb_s), "memory_growth_mb": growth}
    if (full / "zarr").exists():
        numbers["zarr_decode_gb_s"] = in_child(decode_gb_s, full / "zarr")
    return numbers


def decode_gb_s(folder: Path) -> float:
    """GB of uint16 read from a store into memory in use, per second of processor time; checked."""
    rates, codes = [], TokenStore(folder).read_codes(slice(None))
    for _ in range(REPETITIONS):
        store, started = TokenStore(folder), time.process_time()
        store.read_codes(slice(None), out=codes)
        rates.append(codes.nbytes / (time.process_time() - started) / 1e9)
    return median(rates)


def heading(options: argparse.Namespace, ours: dict[str, Any]) -> list[str]:
    """What was measured, how, and against which versions."""
    owners = packages_distributions()
    modules = sorted({way.module for way in PEERS} & set(owners))
    versions = [f"{owners[module][0]} {version(owners[module][0])}" for module in modules]
    return [
        f"{options.rows:,} rows of {CODES} codes below {CODEBOOK} with a class (webdataset: at "
        f"most 100,000), batches of {BATCH}, page cache warm, one torch thread; median (least-most)"
        f" of {REPETITIONS} processes of {options.seconds:g} s; memory is the main process's, over "
        'its imports; "by offset": exact if the user\'s code keeps its place in a permutation.',
        f"Memory copy {ours['memory_copy_gb_s']:.1f} GB/s; {', '.join(versions)}.",
    ]


def table(results: list[Result], rates: dict[str, float]) -> list[str]:
    """Markdown, a line a way; shares and ratios compare int64 with int64, uint16 with uint16."""
    columns = "way|rows/s|of native gather|ours is|first batch s|peak MB|bytes a row|exact resume"
    lines = head(*columns.split("|"))
    for result in results:
        name, narrow = result.way.name, result.way.narrow
        if result.problem:
            lines.append(f"| {name} | {result.problem[:100]} | | | | | | {result.way.resume} |")
            continue
        low, high = short(min(result.rows_per_s)), short(max(result.rows_per_s))
        share, ours = ratio(rates, name, NATIVE[narrow]), ratio(rates, BEST[narrow], name)
        lines.append(
            f"| {name} | {short(rates[name])} ({low}-{high}) | {share:.1%} | {ours:,.1f}× "
            f"| {median(result.first_batch_s):.3f} | {max(result.peak_mb):.0f} "
            f"| {result.bytes_per_row:.0f} | {result.way.resume} |"
        )
    return lines


def short(rate: float) -> str:
    """7.71 M, 146 k or 9.2 k."""
    if rate >= 1e6:
        return f"{rate / 1e6:.2f} M"
    return f"{rate / 1e3:.0f} k" if rate >= 1e5 else f"{rate / 1e3:.1f} k"


def ratio(rates: dict[str, float], name: str, other: str) -> float:
    """Of two rates; nan unless both were measured."""
    return rates.get(name, nan) / rates.get(other, nan)


def loader_targets(
    results: list[Result], rates: dict[str, float], ours: dict[str, Any]
) -> list[str]:
    """What the loader has to reach, and whether it does: Markdown; nan was not measured."""
    of_ours = [result for result in results if result.way in OURS and result.rows_per_s]
    window = [rates[each.way.name] / 1e6 for each in of_ours if "window" in each.way.name]
    first = [median(each.first_batch_s) for each in of_ours]
    growth = ours["memory_growth_mb"].values()
    return [
        *head("target", "asked", "measured", ""),
        *(
            at_least(f"of a native gather, {dtype_name(narrow)}", ratio(rates, mine, native), 0.7)
            for narrow, mine, native in zip((False, True), BEST, NATIVE, strict=True)
        ),
        *(
            at_least(f"times {module}, {dtype_name(narrow)}", times_peer(rates, module, narrow), n)
            for module, narrow, n in PEER_TARGETS
        ),
        at_least("M rows/s by windows, the slowest of ours", min(window, default=nan), 2.0),
        at_least(
            "GB/s of uint16 decoded from zarr by a core", ours.get("zarr_decode_gb_s", nan), 1.0
        ),
        at_most("s to the first batch, the slowest of ours", max(first, default=nan), 0.3),
        at_most(f"MB more in epoch {EPOCHS} than in epoch 1", max(growth, default=nan), FLAT_MB),
    ]


def times_peer(rates: dict[str, float], module: str, narrow: bool) -> float:
    """Ours over the fastest way of that library."""
    peers = [rates[way.name] for way in PEERS if way.module == module and way.name in rates]
    return rates.get(BEST[narrow], nan) / max(peers, default=nan)
