"""What this machine allows: memory copy, and a gather of random rows with nothing around it.

`native_gather` is C, compiled where the bench runs: one pass that gathers, widens and prefetches
ahead, with labels, into a small ring of buffers. `numpy_take` is the same with stock numpy.
"""

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

Pair = tuple[torch.Tensor, torch.Tensor]  # codes (b, N) int64 or uint16, labels (b,) int64
BATCH = 256  # rows
RING = 4  # buffers in turn, as in a loader whose last batches are still in use

SOURCE = """
#include <stdint.h>
enum { AHEAD = 48 }; /* rows between asking for a row (into L2) and reading it */
#define GATHER(name, type)                                                               \\
  void name(const uint16_t *codes, const int32_t *labels, const int64_t *rows, long n,   \\
            long left, long width, type *restrict out, int64_t *restrict out_labels) {   \\
    for (long i = 0; i < n; i++) {                                                       \\
      if (i + AHEAD < left) {                                                            \\
        const char *next = (const char *)(codes + rows[i + AHEAD] * width);              \\
        for (long byte = 0; byte < 2 * width; byte += 64)                                \\
          __builtin_prefetch(next + byte, 0, 2);                                         \\
        __builtin_prefetch(labels + rows[i + AHEAD]);                                    \\
      }                                                                                  \\
      const uint16_t *row = codes + rows[i] * width;                                     \\
      for (long k = 0; k < width; k++)                                                   \\
        out[i * width + k] = row[k];                                                     \\
      out_labels[i] = labels[rows[i]];                                                   \\
    }                                                                                    \\
  }
GATHER(gather_int64, int64_t)
GATHER(gather_uint16, uint16_t)
"""


def memory_copy_gb_s(size_bytes: int = 1 << 27) -> float:
    """GB/s copied from one warm block to another by one thread, the best of ten."""
    source, target = np.ones(size_bytes, np.uint8), np.ones(size_bytes, np.uint8)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return size_bytes / min(seconds) / 1e9


def load_raw(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """codes (rows, N) uint16 and labels (rows,) int32, memory-mapped."""
    return np.load(folder / "codes.npy", "r"), np.load(folder / "labels.npy", "r")


def native_gather(folder: Path, narrow: bool) -> Iterator[Pair]:
    """Endless, in one order made beforehand. FileNotFoundError without a C compiler (cc or $CC)."""
    codes, labels = load_raw(folder)
    width = codes.shape[1]
    gather = compile_gather(narrow)
    ring = [ring_buffer(width, narrow) for _ in range(RING)]
    turn = cycle([(*pair, pair[0].data_ptr(), pair[1].data_ptr()) for pair in ring])
    codes_at, labels_at = codes.ctypes.data, labels.ctypes.data
    rows = np.random.default_rng(0).permutation(len(codes))
    while True:
        for first in range(0, len(rows), BATCH):
            out, out_labels, out_at, out_labels_at = next(turn)
            left = len(rows) - first
            count = min(BATCH, left)
            rows_at = rows.ctypes.data + 8 * first
            gather(codes_at, labels_at, rows_at, count, left, width, out_at, out_labels_at)
            yield out[:count], out_labels[:count]


def ring_buffer(width: int, narrow: bool) -> Pair:
    """Room for a batch of codes and labels."""
    dtype = torch.uint16 if narrow else torch.int64
    return torch.empty((BATCH, width), dtype=dtype), torch.empty(BATCH, dtype=torch.int64)


def compile_gather(narrow: bool) -> "ctypes._NamedFuncPointer":
    """The C function, built for this very processor in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "gather.c"), Path(folder, "gather.so")
        source.write_text(SOURCE)
        compiler = os.environ.get("CC", "cc")
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    function = loaded.gather_uint16 if narrow else loaded.gather_int64
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3 + [ctypes.c_void_p] * 2
    function.restype = None
    return function


def numpy_take(folder: Path, narrow: bool) -> Iterator[Pair]:
    """np.take into a buffer, then (int64) one widening copy; endless, in one order."""
    codes, labels = load_raw(folder)
    ring = cycle([ring_buffer(codes.shape[1], narrow)[0] for _ in range(RING)])
    taken = torch.empty((BATCH, codes.shape[1]), dtype=torch.uint16)
    rows = np.random.default_rng(0).permutation(len(codes))
    shuffled_labels = torch.from_numpy(labels[rows].astype(np.int64))
    while True:
        for first in range(0, len(rows), BATCH):
            some = rows[first : first + BATCH]
            out = next(ring)[: len(some)]
            into = out if narrow else taken[: len(some)]
            np.take(codes, some, axis=0, out=into.numpy(), mode="clip")
            if not narrow:
                out.copy_(into)
            yield out, shuffled_labels[first : first + BATCH]
