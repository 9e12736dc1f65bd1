"""How train_stage.bench measures ways to read batches: checked first, then timed.

Every measurement is a process of its own, forked before anything here has started a thread; what
libraries print goes to stderr.
"""

import importlib
import importlib.util
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train_stage.benchmarks.limits import BATCH, Pair, load_raw

CODES, CODEBOOK, CLASSES = 256, 1024, 1000
CHECK_ROWS, REPETITIONS, EPOCHS = 20_000, 3, 5
CHILD_LIMIT_S = 180  # a process that takes longer is stopped, and its way reported as failed
Writer = Callable[[Path, np.ndarray, np.ndarray], None]  # (folder, codes, labels)


@dataclass(frozen=True)
class Way:
    """One line of the table: which files it reads, and how it makes batches of them, endlessly."""

    name: str
    form: str  # the files: "raw" or a key of the writers
    batches: Callable[[Path], Iterator[Pair]]
    resume: str  # exact resume in mid-epoch: "yes", "by offset" (kept by the user's code), "no"
    module: str = "torch"  # what must be importable
    narrow: bool = False  # uint16 batches instead of int64
    most_rows: int | None = None  # use no more


@dataclass
class Result:
    """What was measured of a way; one number a repetition."""

    way: Way
    rows_per_s: list[float] = field(default_factory=list)
    first_batch_s: list[float] = field(default_factory=list)  # from opening the files
    peak_mb: list[float] = field(default_factory=list)  # resident, over what imports took
    bytes_per_row: float = 0.0  # on disk
    problem: str = ""  # why there are no numbers


def measure_all(
    ways: list[Way], writers: dict[str, Writer], folder: Path, rows: int, seconds: float
) -> list[Result]:
    """Checks every way, then times those that passed; folder/full keeps the files."""
    full, small = folder / "full", folder / "small"
    in_child(write_random, full / "raw", rows)
    in_child(write_random, small / "raw", min(rows, CHECK_ROWS))
    results = [Result(way) for way in ways]
    for result in results:
        attempt(prepare, result, writers, full, small)
    os.sync()  # no write-back while the clock runs
    for _ in range(REPETITIONS):
        for result in results:
            if not result.problem:
                attempt(repeat, result, full, seconds)
    return results


def attempt(action: Callable[..., None], result: Result, *arguments: Any) -> None:
    """Does it; what goes wrong is written into the result and told."""
    try:
        action(result, *arguments)
    except Exception as error:  # whatever a library raises: its line of the table says so
        result.problem = f"failed: {type(error).__name__}: {error}".splitlines()[0]
    told = result.problem or (f"{result.rows_per_s[-1]:,.0f}" if result.rows_per_s else "right")
    print(f"{result.way.name}: {told}", file=sys.stderr)


def prepare(result: Result, writers: dict[str, Writer], full: Path, small: Path) -> None:
    """Writes the way's files unless another way has, and checks that its rows come right."""
    way = result.way
    if importlib.util.find_spec(way.module) is None:
        result.problem = "not installed"
        return
    for folder in (small, full):
        if not (folder / way.form).exists():
            in_child(write_form, writers[way.form], folder, way)
    in_child(check_rows, way, small)
    size = sum(file.stat().st_size for file in (full / way.form).rglob("*") if file.is_file())
    rows = len(load_raw(full / "raw")[1])
    result.bytes_per_row = size / min(rows, way.most_rows or rows)


def repeat(result: Result, full: Path, seconds: float) -> None:
    """One repetition."""
    files = full / result.way.form
    rows_per_s, first_batch_s, peak_mb = in_child(time_batches, result.way, files, seconds)
    result.rows_per_s.append(rows_per_s)
    result.first_batch_s.append(first_batch_s)
    result.peak_mb.append(peak_mb)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a forked process; raises what it raises."""
    with ProcessPoolExecutor(1, get_context("fork"), initializer=start_child) as pool:
        return pool.submit(function, *arguments).result()


def start_child() -> None:
    """One torch thread, prints to stderr, and an end at the time limit."""
    os.dup2(2, 1)
    torch.set_num_threads(1)
    signal.alarm(CHILD_LIMIT_S)


def write_random(folder: Path, rows: int) -> None:
    """Uniform random codes and classes, as two .npy files."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    np.save(folder / "codes.npy", generator.integers(0, CODEBOOK, (rows, CODES), dtype=np.uint16))
    np.save(folder / "labels.npy", generator.integers(0, CLASSES, rows, dtype=np.int32))


def write_form(writer: Writer, folder: Path, way: Way) -> None:
    """The way's files, from folder/raw; renamed into place once they are whole."""
    unfinished = folder / f"{way.form}.part"
    unfinished.mkdir()
    codes, labels = load_raw(folder / "raw")
    writer(unfinished, codes[: way.most_rows], labels[: way.most_rows])
    unfinished.rename(folder / way.form)


def check_rows(way: Way, folder: Path) -> None:
    """Raises ValueError unless the first epoch is the set, every row once with its own label."""
    codes, labels = load_raw(folder / "raw")
    hashes, delivered = row_hashes(codes, labels), np.empty(0, np.uint64)
    batches = way.batches(folder / way.form)
    while len(delivered) < len(hashes):
        some, classes = next(batches)
        if some.dtype != (torch.uint16 if way.narrow else torch.int64):
            raise ValueError(f"batches of {some.dtype}")
        delivered = np.append(delivered, row_hashes(some.numpy(), classes.numpy()))
    wrong = len(hashes) - len(np.intersect1d(hashes, delivered[: len(hashes)]))
    if wrong:
        raise ValueError(f"{wrong} of {len(hashes)} rows missing, repeated or wrongly labelled")


def row_hashes(codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(rows,) uint64 of codes and label together."""
    odd = np.random.default_rng(1).integers(1 << 63, size=codes.shape[1] + 1, dtype=np.uint64)
    odd = odd * 2 + 1
    return codes.astype(np.uint64) @ odd[:-1] + labels.astype(np.uint64) * odd[-1]


def time_batches(way: Way, files: Path, seconds: float) -> tuple[float, float, float]:
    """(rows a second after a warm-up, seconds to the first batch, peak MB over the imports)."""
    importlib.import_module(way.module)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    batches = way.batches(files)
    next(batches)
    first_batch_s = time.perf_counter() - started
    run_for(batches, seconds / 4)
    rows_per_s = run_for(batches, seconds)
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rows_per_s, first_batch_s, (peak_kb - before_kb) / 1024


def run_for(batches: Iterator[Pair], seconds: float) -> float:
    """Rows a second over at least that long."""
    rows, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        rows += len(next(batches)[0])
    return rows / passed


def memory_growth_mb(way: Way, files: Path, rows: int) -> float:
    """The most resident memory within the fifth epoch over the most within the first (Linux)."""
    batches, most = way.batches(files), []
    for _ in range(EPOCHS):
        samples = []
        for step in range(-(-rows // BATCH)):
            next(batches)
            if step % 32 == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                samples.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        most.append(max(samples))
    return most[-1] - most[0]
