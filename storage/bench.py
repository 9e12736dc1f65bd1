"""Size and speed of both backends on uniform random codes: python -m storage.bench

Prints, for each codebook size, bits a code on disk over ceil(log2 K), and write and (warm) read in
GB/s of uint16 rows, beside a plain memory copy of the same rows in the same run.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from storage.reader import TokenStore
from storage.schema import ArrayColumn, StoreMeta, Tokenizer
from storage.stats import store_sizes
from storage.writer import ShardWriter, create_store

ROWS, CODES = 65_536, 256


def main() -> int:
    """Prints the table."""
    print(f"{ROWS:,} rows of {CODES} codes, one shard; GB/s of uint16, best of 5")
    print("K      backend  bits/code  over log2 K    write     read   memory copy")
    for size in (1024, 8192, 16384):
        codes = np.random.default_rng(0).integers(0, size, (ROWS, CODES)).astype(np.uint16)
        copy = codes.nbytes / best_seconds(codes.copy) / 1e9
        for backend in ("zarr", "arrow"):
            with tempfile.TemporaryDirectory() as folder:
                bits, write, read = measure(Path(folder), backend, codes, size)
            least = (size - 1).bit_length()
            print(
                f"{size:<6} {backend:<8} {bits:9.3f} {bits / least:12.4f} {write:8.2f} {read:8.2f} "
                f"{copy:13.2f}"
            )
    return 0


def measure(folder: Path, backend: str, codes: np.ndarray, size: int) -> tuple[float, float, float]:
    """(bits a code, write GB/s, read GB/s) of one shard, checks and flushes included."""
    tokenizer = Tokenizer("none", "none", size, [16, 16], "0" * 64)
    arrays = {"codes": ArrayColumn("uint16", [CODES])}
    meta = StoreMeta(256, arrays, {"codes": tokenizer}, backend=backend)  # type: ignore[arg-type]
    create_store(folder, meta)
    started = time.perf_counter()
    with ShardWriter(folder, "a", source="random") as writer:
        writer.add({"codes": codes, "key": [str(row) for row in range(ROWS)]})
    write = codes.nbytes / (time.perf_counter() - started) / 1e9
    read = codes.nbytes / best_seconds(lambda: TokenStore(folder).read_codes(slice(None))) / 1e9
    return store_sizes(TokenStore(folder))["bits_per_code"]["codes"], write, read


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
