"""Codes kept in memory, or on a GPU, for the whole run: read once, gathered from then on."""

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from storage.reader import TokenStore
from train_stage.loading.compiled_loops import gather

SPAN = 65_536  # rows read at once


class RowsInMemory:
    """The chosen rows of a column as one array."""

    def __init__(self, store: TokenStore, column: str, rows: np.ndarray | None, quiet: bool = True):
        """rows: numbers to keep, ascending; None: all. Raises MemoryError before it is late."""
        spec = store.meta.arrays[column]
        count = len(store) if rows is None else len(rows)
        size = count * int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
        check_fits(size, available_memory(), store.path)
        self.codes = np.empty((count, *spec.shape), spec.dtype)
        self._flat = self.codes.reshape(-1)
        with tqdm(
            desc=f"loading {store.path}",
            total=size,
            unit="B",
            unit_scale=True,
            disable=quiet or None,
        ) as bar:
            for first in range(0, count, SPAN):
                out = self.codes[first : first + SPAN]
                span = slice(first, first + len(out))
                store.read_codes(span if rows is None else rows[span], column, out=out)
                bar.update(out.nbytes)

    def index(self, picks: np.ndarray) -> np.ndarray:
        """Offsets (n,) int64, for `gather`, of chosen rows."""
        return picks * math.prod(self.codes.shape[1:])

    def gather(self, index: np.ndarray, rows: int, out: np.ndarray | None = None) -> np.ndarray:
        """The rows at the first offsets: (rows, N), in `out` where given."""
        return gather(self._flat, index, rows, self.codes.shape[1:], out)


class RowsOnDevice:
    """The same on a device; only the index travels there."""

    def __init__(self, rows: RowsInMemory, device: torch.device):
        """Raises ValueError for codes of 32 bits, which no model has."""
        if rows.codes.dtype != np.uint16:
            raise ValueError(f"preload=gpu wants uint16 codes, these are {rows.codes.dtype}")
        self.codes = torch.from_numpy(rows.codes.view(np.int16)).to(device)  # gathers lack uint16

    def gather(self, index: np.ndarray, rows: int, out: np.ndarray | None = None) -> Tensor:
        """Rows (rows, N) uint16 on the device; `out` lies elsewhere and is left alone."""
        on_device = torch.from_numpy(index[:rows]).to(self.codes.device, non_blocking=True)
        return self.codes.index_select(0, on_device).view(torch.uint16)


def check_fits(size: int, available: int | None, what: object) -> None:
    """Raises MemoryError, naming the ways out, when `size` bytes are more than there are."""
    if available is not None and size > available:
        raise MemoryError(
            f"{what}: {size / 1e9:.1f} GB of codes for each process, {available / 1e9:.1f} GB of "
            "memory are free; take preload=none with an arrow store (muse-store convert --backend "
            "arrow), or shuffle=window"
        )


def available_memory() -> int | None:
    """Bytes that this process may take: free on the machine, allowed by its control groups."""
    found = []
    if Path("/proc/meminfo").is_file():
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for folder in control_groups(Path("/proc/self/cgroup")):
        limit = folder / "memory.max"
        if limit.is_file() and limit.read_text().strip().isdigit():  # else "max"
            found.append(int(limit.read_text()))
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if found else None


def control_groups(file: Path) -> list[Path]:
    """The folders of a process's control group (version 2) and of those above it; Slurm's limit
    stands in one of them. file: /proc/self/cgroup."""
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    group = Path("/sys/fs/cgroup", *names)
    return [group, *(parent for parent in group.parents if "cgroup" in parent.parts)]
