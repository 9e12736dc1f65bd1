"""How the benchmarks of the models measure: ways in turns, milliseconds, peak memory, FLOPs."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

Way = Callable[[], Any]


class Measured(NamedTuple):
    """One line of a table."""

    ms: float  # median of the rounds
    peak_mib: float  # memory at its highest, over what was there before


def measure(ways: dict[str, Way], device: torch.device, rounds: int) -> dict[str, Measured]:
    """Warms every way up, then times them in turns; the first round also looks at memory."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks = {}
    for way in ways.values():
        way()
    for number in range(rounds):
        for name, way in ways.items():
            if number == 0:
                before = start_peak(device)
            synchronize(device)
            began = time.perf_counter()
            way()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - began))
            if number == 0:
                peaks[name] = peak_mib(device) - before
    return {name: Measured(median(times[name]), peaks[name]) for name in ways}


def start_peak(device: torch.device) -> float:
    """Forgets how much memory was in use at most; how much is in use now, MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back first
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")


def peak_mib(device: torch.device) -> float:
    """The most memory in use since start_peak, MiB; on a CPU the whole process's, Linux only."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_mib("VmHWM")


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (at most) of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":"))) / 1024


def count_flops(way: Way) -> int:
    """FLOPs of one call's matrix products, convolutions and attentions, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """What a large matrix product reaches here, the best of ten: TFLOP/s."""
    side = 8192 if device.type == "cuda" else 4096
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_table(
    title: str, measured: dict[str, Measured], flops: int, speed: float, images: int
) -> None:
    """ms, ratio to the first way, images/s, peak memory, and share of the limit.

    flops: of the first way, by which every way is judged; speed: TFLOP/s of a matrix product.
    """
    limit_ms = flops / (speed * 1e12) * 1e3
    first = next(iter(measured.values())).ms
    print(f"\n{title}: {flops / 1e9:,.0f} GFLOP, {limit_ms:,.1f} ms at the speed of a product")
    print("| way | ms | ratio | images/s | of the limit | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (ms, peak) in measured.items():
        print(
            f"| {name} | {ms:,.1f} | {first / ms:.2f} | {1e3 * images / ms:.3g} "
            f"| {limit_ms / ms:.0%} | {peak:,.0f} |"
        )
