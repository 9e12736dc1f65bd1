"""How fast matrix products can be where this runs: the yardstick of a run's MFU (steps 5 to 7).

A GPU's figure is its maker's, dense and accumulated in float32; of anything else there is none, so
a product is timed once, and what is said of it says that.
"""

import re
import time
from functools import cache
from typing import Literal, NamedTuple

import torch

Kind = Literal["no", "tf32", "fp16", "bf16"]
TIMING_S = 0.15


class Peak(NamedTuple):
    """TFLOP/s of one GPU; None where it has no such units."""

    no: float  # float32
    tf32: float | None
    fp16: float
    bf16: float | None


PEAK_TFLOPS: dict[str, Peak] = {
    "B200": Peak(75, 1125, 2250, 2250),
    "H200 NVL": Peak(60, 418, 836, 836),
    "H200": Peak(67, 495, 989, 989),
    "GH200": Peak(67, 495, 989, 989),
    "H100 NVL": Peak(60, 418, 836, 836),
    "H100 PCIe": Peak(51, 378, 756, 756),
    "H100": Peak(67, 495, 989, 989),
    "A100": Peak(19.5, 156, 312, 312),
    "A40": Peak(37.4, 74.8, 150, 150),
    "A30": Peak(10.3, 82, 165, 165),
    "A10": Peak(31.2, 62.5, 125, 125),
    "A10G": Peak(31.5, 35, 70, 70),
    "L40S": Peak(91.6, 183, 362, 362),
    "L40": Peak(90.5, 90.5, 181, 181),
    "L4": Peak(30.3, 60, 121, 121),
    "RTX A6000": Peak(38.7, 77.4, 155, 155),
    "RTX 5090": Peak(105, 105, 210, 210),
    "RTX 4090": Peak(82.6, 82.6, 165, 165),
    "RTX 3090": Peak(35.6, 35.6, 71, 71),
    "V100-PCIE": Peak(14, None, 112, None),
    "V100": Peak(15.7, None, 125, None),
    "T4": Peak(8.1, None, 65, None),
    "MI325X": Peak(163, 654, 1307, 1307),
    "MI300X": Peak(163, 654, 1307, 1307),
    "MI250X": Peak(95.7, None, 383, 383),
}


class Yardstick(NamedTuple):
    """What a share of speed is a share of."""

    tflops: float
    source: str  # for people


def kind_of(mixed_precision: str, enable_tf32: bool) -> Kind:
    """The units that the matrix products of a run use on a GPU."""
    if mixed_precision == "no":
        return "tf32" if enable_tf32 else "no"
    return "fp16" if mixed_precision == "fp16" else "bf16"


def peak_tflops(gpu: str, kind: Kind) -> float | None:
    """The data sheet's TFLOP/s of the GPU that calls itself `gpu`; None for one not listed.

    Without units for TF32 the products are float32's.
    """
    for name, peak in PEAK_TFLOPS.items():
        if re.search(rf"(?<![A-Z0-9]){re.escape(name)}(?![A-Z0-9])", gpu, re.IGNORECASE):
            found = getattr(peak, kind)
            return peak.no if found is None and kind == "tf32" else found
    return None


def yardstick(device: torch.device, mixed_precision: str, enable_tf32: bool) -> Yardstick:
    """The peak that a run on `device` is measured by: listed, else timed (0.15 s, once)."""
    if device.type == "cuda":
        kind = kind_of(mixed_precision, enable_tf32)
        gpu = torch.cuda.get_device_name(device)
        if listed := peak_tflops(gpu, kind):
            return Yardstick(listed, f"the peak of {gpu} in {kind}")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    return Yardstick(timed_tflops(device, dtype), "the measured matmul speed")


@cache
def timed_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square product: the best of as many as there is time for.

    Small ones, too: where others use the processors, only they get a slice of time for themselves.
    """
    best = 0.0
    for size in (512, 1024) if device.type == "cpu" else (4096,):
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        end = time.perf_counter() + TIMING_S / 2
        while (started := time.perf_counter()) < end:
            (matrix @ matrix)[0, 0].item()  # a sync on a GPU
            best = max(best, 2 * size**3 / (time.perf_counter() - started) / 1e12)
    return best
