"""Rows a second of the loader beside other ways to read the same rows: python -m train_stage.bench

One process, page cache warm, shuffled batches of 256 rows of 256 codes with their class, as int64.
"""

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from storage.reader import TokenStore
from storage.schema import ArrayColumn, StoreMeta, Tokenizer
from storage.writer import ShardWriter, create_store
from train_stage.loader import TokenLoader

ROWS, CODES, BATCH = 200_000, 256, 256


def main() -> int:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        store = TokenStore(make_store(Path(folder)))
        codes = torch.from_numpy(store.read_codes(slice(None)).astype(np.int32))
        labels = torch.from_numpy(store.read_column("class_id"))
        ways = {
            "TokenLoader": (batch.codes for batch in TokenLoader(store, BATCH)),
            "index_select of a permutation (no loader)": gather(codes),
            "torch DataLoader, 0 workers": map_style(codes, labels),
        }
        print(
            f"{ROWS:,} rows of {CODES} codes, batches of {BATCH}, {torch.get_num_threads()} threads"
        )
        for name, batches in ways.items():
            print(f"{rows_per_s(batches):12,.0f} rows/s  {name}")
    return 0


def make_store(folder: Path) -> Path:
    """A store of uniform random codes below 1024."""
    tokenizer = Tokenizer("none", "none", 1024, [16, 16], "0" * 64)
    arrays = {"codes": ArrayColumn("uint16", [CODES])}
    create_store(folder, StoreMeta(256, arrays, {"codes": tokenizer}, backend="arrow"))
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "a", source="random") as writer:
        codes = rng.integers(0, 1024, (ROWS, CODES)).astype(np.uint16)
        keys = [str(row) for row in range(ROWS)]
        writer.add({"codes": codes, "key": keys, "class_id": rng.integers(0, 1000, ROWS)})
    return folder


def gather(codes: torch.Tensor) -> Iterator[torch.Tensor]:
    """The least a batch can cost in torch: one gather and one widening."""
    while True:
        for rows in torch.randperm(len(codes)).split(BATCH):
            yield codes.index_select(0, rows).long()


def map_style(codes: torch.Tensor, labels: torch.Tensor) -> Iterator[torch.Tensor]:
    """What most training scripts do: one Python call a row, then stacking."""
    while True:
        for batch, _ in DataLoader(TensorDataset(codes, labels), BATCH, shuffle=True):
            yield batch.long()


def rows_per_s(batches: Iterable[torch.Tensor], seconds: float = 4.0) -> float:
    """Rows a second after a warm-up of ten batches."""
    iterator = iter(batches)
    for _ in islice(iterator, 10):
        pass
    rows, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        rows += len(next(iterator))
    return rows / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
