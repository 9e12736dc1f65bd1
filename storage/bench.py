"""Size and speed of a store, on uniform random codes: python -m storage.bench

Three tables: writing and reading codes beside a memory copy and beside zarr-python and pyarrow on
the same files in the same run, checks and flushes included; reading table columns; and opening
stores of 1e8 and 1e9 rows of which only the index exists.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import zarr

from storage.index import INDEX_SCHEMA, Index, summarize, write_index
from storage.reader import TokenStore
from storage.schema import TABLE_SCHEMA, ArrayColumn, Backend, StoreMeta, Tokenizer
from storage.stats import store_sizes
from storage.writer import ShardWriter, create_store

ROWS, CODES = 65_536, 256
ROWS_PER_SHARD = 10_000  # of the large stores
FILES = {"codes.zarr/c/0/0": 3_213_012, "codes.zarr/zarr.json": 1286, "rows.parquet": 542_020}
OPEN = r"""
import json, re, sys, time
from storage.reader import TokenStore
def memory(field):
    return int(re.search(field + r":\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
imports, started = memory("VmRSS"), time.perf_counter()
store = TokenStore(sys.argv[1])
seconds, peak = time.perf_counter() - started, memory("VmHWM")
print(json.dumps({"rows": len(store), "seconds": seconds, "bytes": peak - imports}))
"""


def main() -> int:
    """Prints the tables."""
    cores = len(os.sched_getaffinity(0))
    print(f"{ROWS:,} rows of {CODES} codes in one shard; GB/s of uint16, best of 5; {cores} cores")
    print("                                            one core:                  all cores:")
    print("K      backend  bits/code  over log2 K  write   read  theirs  memory copy    read")
    for size in (1024, 8192, 16384):
        for backend in ("zarr", "arrow"):
            with tempfile.TemporaryDirectory() as folder:
                print(f"{size:<6} {backend:<8} " + measure_codes(Path(folder), backend, size))
    with tempfile.TemporaryDirectory() as folder:
        print(f"\n{10 * ROWS:,} rows in 10 shards; M rows/s\n" + measure_table(Path(folder)))
    print("\nopening a sealed store in a fresh process, best of 3")
    print("        rows   shards   index MB    open ms   memory MB")
    for shards in (10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            index_bytes = write_large_store(Path(folder), shards)
            best = min((open_afresh(Path(folder)) for _ in range(3)), key=lambda o: o["seconds"])
        print(
            f"{best['rows']:>12,} {shards:>8,} {index_bytes / 1e6:>10.1f} "
            f"{best['seconds'] * 1e3:>10.0f} {best['bytes'] / 1e6:>11.0f}"
        )
    return 0


def measure_codes(folder: Path, backend: Backend, size: int) -> str:
    """A line of the first table; checks and flushes included."""
    codes = np.random.default_rng(0).integers(0, size, (ROWS, CODES)).astype(np.uint16)
    keys, out = [str(row) for row in range(ROWS)], np.empty_like(codes)
    folder = folder / "store"

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        create_store(folder, bench_meta(backend, size))
        with ShardWriter(folder, "a", source="random") as writer:
            writer.add({"codes": codes, "key": keys})

    def read() -> object:
        return TokenStore(folder).read_codes(slice(None), out=out)

    with one_core():
        seconds = [best_seconds(write)]
        actions = [read, PEERS[backend](folder, out), lambda: np.copyto(out, codes)]
        seconds += map(best_seconds, actions)
    rates = [codes.nbytes / taken / 1e9 for taken in [*seconds, best_seconds(read)]]
    assert np.array_equal(out, codes)
    bits = store_sizes(TokenStore(folder))["bits_per_code"]["codes"]
    return f"{bits:9.3f} {bits / (size - 1).bit_length():12.4f}" + (
        f"{rates[0]:7.2f} {rates[1]:6.2f} {rates[2]:7.2f} {rates[3]:12.2f} {rates[4]:7.2f}"
    )


def zarr_read(folder: Path, out: np.ndarray) -> Callable[[], object]:
    """zarr-python's own reading of the codes."""
    array = zarr.open_array(folder / "shards" / "a" / "codes.zarr", mode="r")
    return lambda: np.copyto(out, np.asarray(array[:]))


def arrow_read(folder: Path, out: np.ndarray) -> Callable[[], object]:
    """pyarrow's own reading of the codes; unlike ours without a check."""

    def read() -> None:
        with pa.memory_map(str(folder / "shards" / "a" / "codes.arrow")) as source:
            rows = pa.ipc.open_file(source).get_batch(0).column(0).flatten()
            np.copyto(out, rows.to_numpy().reshape(out.shape))

    return read


PEERS = {"zarr": zarr_read, "arrow": arrow_read}


def measure_table(folder: Path) -> str:
    """The second table: a filter, a column, the whole table with codes."""
    rng, schema = np.random.default_rng(0), pa.schema([("aesthetic", pa.float32())])
    create_store(folder, bench_meta("arrow", 1024))
    for shard in range(10):
        with ShardWriter(folder, f"{shard}", f"{shard}.tar", extra_columns=schema) as writer:
            keys = [f"{shard}-{row:06d}" for row in range(ROWS)]
            writer.add(
                {
                    "codes": rng.integers(0, 1024, (ROWS, CODES)),
                    "key": keys,
                    "caption": [f"a picture of {key}" for key in keys],
                    "class_id": rng.integers(0, 1000, ROWS),
                    "aesthetic": 10 * rng.random(ROWS),
                }
            )
    store = TokenStore(folder)
    actions: dict[str, Callable[[], object]] = {
        'rows_where("aesthetic >= 5")': lambda: store.rows_where("aesthetic >= 5"),
        'read_column("class_id")': lambda: store.read_column("class_id"),
        "table()": store.table,
        "to_arrow()": store.to_arrow,
    }
    rates = {name: len(store) / best_seconds(action, 3) / 1e6 for name, action in actions.items()}
    return "\n".join(f"{name:<30} {rate:8.1f}" for name, rate in rates.items())


def write_large_store(folder: Path, shards: int) -> int:
    """A sealed store of ROWS_PER_SHARD rows a shard with empty shard folders; its index's bytes."""
    create_store(folder, bench_meta("zarr", 1024))
    rows = []
    for shard in range(shards):
        name = f"{shard:06d}"
        (folder / "shards" / name).mkdir()
        digest = np.random.default_rng(shard).bytes(32)
        manifest = {
            "name": name,
            "source": f"s3://bucket/{name}.tar",
            "skipped": shard % 7,
            "skip_reasons": {"not an image": shard % 7},
            "columns": {field.name: str(field.type) for field in TABLE_SCHEMA},
            "content": {"codes": digest.hex()},
            "largest_class_id": 999,
            "files": {file: {"bytes": size + shard % 1000} for file, size in FILES.items()},
        }
        summary = json.dumps(summarize(manifest), separators=(",", ":"))
        entry = {"folder": name, "rows": ROWS_PER_SHARD, "manifest": digest, "summary": summary}
        rows.append(entry)
    write_index(folder, Index(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)))
    return next(folder.glob("index-*.parquet")).stat().st_size


def open_afresh(folder: Path) -> dict[str, float]:
    """rows, seconds and bytes (over the imports, at most) of opening a store in a new process."""
    command = [sys.executable, "-c", OPEN, str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def bench_meta(backend: Backend, size: int) -> StoreMeta:
    """Of a store of CODES codes in [0, size) a row."""
    tokenizer = Tokenizer("none", "none", size, [16, 16], "0" * 64)
    arrays = {"codes": ArrayColumn("uint16", [CODES])}
    return StoreMeta(256, arrays, {"codes": tokenizer}, backend=backend)


@contextmanager
def one_core() -> Iterator[None]:
    """Keeps all threads of this process to one core."""
    cores = os.sched_getaffinity(0)
    _allow({min(cores)})
    try:
        yield
    finally:
        _allow(cores)


def _allow(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def best_seconds(action: Callable[[], object], times: int = 5) -> float:
    """The shortest of several runs."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
