"""Stage one beside other ways and the machine's limits, in tables: decoding, encoders, all of it.

    python -m tokenize_stage.bench [decode] [encode] [pipeline] [memory] --images FOLDER
    python -m tokenize_stage.bench encode pipeline --device cuda --images FOLDER

Without names all sections are run. FOLDER has JPEG photographs, which are repeated as often as is
needed; without it, those that come with scikit-learn or scikit-image. Ways are timed in turns; what
is told is the median (least-most) of the turns.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from tokenize_stage.bench_decode import psnr, time_decoding
from tokenize_stage.bench_encode import CPU_WAYS, GPU_WAYS, MODELS, limit, time_encoders
from tokenize_stage.bench_pipeline import (
    OURS,
    PipelineRun,
    changed_codes,
    memory_mib,
    time_pipelines,
)

REFERENCE = "the reference's"
FLAT_MIB = 32.0  # growth that counts as none
Table = list[str]


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections and prints their tables; returns 2 when there are no photographs."""
    options = parse(arguments)
    try:
        photographs = find_photographs(options.images)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{machine(options.device)}; {len(photographs)} photographs, {options.resolution} px\n")
    for name in options.sections or SECTIONS:
        print("\n".join(SECTIONS[name](options, photographs)), end="\n\n", flush=True)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tokenize_stage.bench", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of JPEG photographs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the encoders")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--count", type=int, help="images of the pipeline's tar; 48, cuda: 20000")
    parser.add_argument("--batch-size", type=int, help="8, on a GPU 128")
    parser.add_argument("--model", choices=MODELS, action="append", help="all; pipeline: the first")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    is_cpu = options.device == "cpu"
    options.count = options.count or (48 if is_cpu else 20_000)
    options.batch_size = options.batch_size or (8 if is_cpu else 128)
    options.model = options.model or list(MODELS)
    return options


def find_photographs(folder: Path | None) -> list[Path]:
    """The JPEGs of a folder, else of installed libraries. Raises ValueError without any."""
    places = [folder] if folder else [*_samples("sklearn"), *_samples("skimage")]
    found = [path for place in places for path in sorted(place.rglob("*.jp*g"))]
    if not found:
        where = f"{folder} has no *.jpg" if folder else "no photographs are installed"
        raise ValueError(f"{where}: give a folder by --images, or pip install scikit-learn")
    return found


def _samples(module: str) -> list[Path]:
    spec = find_spec(module)
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec else []


def machine(device: str) -> str:
    """What it was measured on."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    kind = " with AMX" if "amx_bf16" in flags else " with AVX-512" if "avx512f" in flags else ""
    cpu = f"{len(os.sched_getaffinity(0))} cores {names[0] if names else platform.machine()}{kind}"
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return f"{cpu}{gpu}, torch {torch.__version__}"


def decode_section(options: argparse.Namespace, photographs: Sequence[Path]) -> Table:
    """Images a second from bytes in memory to pixels, and how near those of the reference are."""
    data = [path.read_bytes() for path in photographs]
    one, two = (
        time_decoding(data, options.resolution, threads, options.seconds, options.turns)
        for threads in (1, 2)
    )
    near = psnr(data[:64], options.resolution)
    libraries = [name for name in one if not name.startswith(("ours", "reference"))]
    fastest = max(median(one[name]) for name in libraries)
    lines = _head("JPEG to pixels", "images/s, 1 thread", "2 threads", "ours is", "PSNR, dB")
    for name in one:
        times = median(one["ours"]) / median(one[name])
        lines.append(_line(name, spread(one[name]), spread(two[name]), f"{times:.2f}×", near[name]))
    return [*lines, "", *targets(("times the fastest library", median(one["ours"]) / fastest, 1.0))]


def encode_section(options: argparse.Namespace, _: Sequence[Path]) -> Table:
    """Images a second from uint8 pixels in memory to codes, full batches."""
    lines = _head("encoder", "images/s", "of the reference's", "limit", "of the limit")
    for model in options.model:
        ways = CPU_WAYS if options.device == "cpu" else GPU_WAYS
        sizes = options.resolution, options.batch_size, options.device
        rates = time_encoders(model, ways, *sizes, options.seconds, options.turns)
        reference = median(rates[REFERENCE])
        for name, way in ways.items():
            bound = limit(model, options.resolution, options.device, way)
            rate = median(rates[name])
            share = f"{rate / bound:.0%}"
            times = f"{rate / reference:.2f}×"
            lines.append(
                _line(f"{model}, {name}", spread(rates[name]), times, f"{bound:.1f}", share)
            )
    said = (
        "Limit: operations over what a 3x3 convolution of 128 channels at 256 px reaches here"
        if options.device == "cpu"
        else "Limit: the roofline of an H100, pointwise operations fused where compiled"
    )
    return [*lines, "", f"{said}; {REFERENCE}: float32, NCHW, the heap as glibc has it."]


def pipeline_section(options: argparse.Namespace, photographs: Sequence[Path]) -> Table:
    """Images a second from a tar of JPEGs to a sealed store, loading of the model included."""
    with tempfile.TemporaryDirectory() as folder:
        run = PipelineRun(
            Path(folder), options.model[0], options.resolution, options.device, options.batch_size
        )
        run.prepare(photographs, options.count)
        turns = min(2, options.turns)
        rates = time_pipelines(run, options.count, turns)
        changed = changed_codes(run)
    reference = median(rates[REFERENCE])
    lines = _head(
        f"{options.count} images of a tar", "images/s", "of the reference's", "codes changed"
    )
    for name, some in rates.items():
        share = f"{changed[name]:.2%}"
        lines.append(_line(name, spread(some), f"{median(some) / reference:.2f}×", share))
    asked = [
        (f"times the reference's way, {name}", median(rates[name]) / reference, 3.0)
        for name in OURS[options.device]
    ]
    if options.device == "cuda":
        float16 = {"float16": GPU_WAYS["float16"]}
        sizes = options.resolution, options.batch_size, options.device
        alone = time_encoders(options.model[0], float16, *sizes, options.seconds, turns)["float16"]
        busy = median(rates["ours, float16"]) / median(alone)
        asked.append(("of the encoder alone, so that the GPU is busy", busy, 0.9))
    return [*lines, "", *targets(*asked)]


def memory_section(options: argparse.Namespace, photographs: Sequence[Path]) -> Table:
    """Resident memory of a run over 50 shards, with a small tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        early, late = memory_mib(Path(folder), photographs, options.resolution)
    lines = _head("memory", "MiB after shard 5", "after shard 50", "more", "")
    verdict = "pass" if late - early < FLAT_MIB else "FAIL"
    name = f"resident, less than {FLAT_MIB:g} more asked"
    return [*lines, _line(name, f"{early:.0f}", f"{late:.0f}", f"{late - early:.0f}", verdict)]


def spread(rates: Sequence[float]) -> str:
    """Median (least-most), to three digits."""
    numbers = (median(rates), min(rates), max(rates))
    middle, low, high = (f"{n:.0f}" if n >= 100 else f"{n:.3g}" for n in numbers)
    return f"{middle} ({low}-{high})"


def _head(*names: str) -> Table:
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def targets(*asked: tuple[str, float, float]) -> Table:
    """What was to be reached: (what, measured, at least)."""
    return [
        *_head("target", "asked", "measured", ""),
        *(
            _line(what, f"≥ {least:g}", f"{value:.2f}", "pass" if value >= least else "FAIL")
            for what, value, least in asked
        ),
    ]


Section = Callable[[argparse.Namespace, Sequence[Path]], Table]
SECTIONS: Mapping[str, Section] = {
    "decode": decode_section,
    "encode": encode_section,
    "pipeline": pipeline_section,
    "memory": memory_section,
}


if __name__ == "__main__":
    sys.exit(main())
