"""Training steps: from the store beside encoding in the loop, beside the reference's, their MFU.

    python -m train_stage.bench training [--device cuda] [--compile] [--reference FOLDER]

A step is muse-train's: the batch of a store, masks, forward, scored codes only, backward, AdamW;
below float32 by autocast over float32 weights. Random codes, pixels and weights; ways in turns.
"""

import argparse
import gc
import tempfile
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch

from train_stage import pictures
from train_stage.benchmarks.bench_models import IMAGENET
from train_stage.benchmarks.measure import CODES
from train_stage.benchmarks.tables import Target, head, line, targets
from train_stage.benchmarks.timing import Way, count_flops, measure, peak_mib
from train_stage.benchmarks.training_steps import (
    import_reference,
    our_step,
    random_loader,
    reference_step,
    share_of_waiting,
)
from train_stage.loading.loader import Batch, TokenLoader
from train_stage.models.sizes import MODELS, count_parameters, size_fields
from train_stage.models.transformer import MaskGitTransformer
from train_stage.training.clock import Clock
from train_stage.training.devices import pick_device
from train_stage.training.peak_speed import yardstick

RESOLUTION = 256
BATCH = {"cpu": 4, "cuda": 64}  # images a step
SIZES = {"cpu": ("small", "base"), "cuda": ("base", "large")}
ASKED = {  # ratios; MFU of the architectures
    "cpu": {"in the loop": 3.0, "reference": 1.3},
    "cuda": {"reference": 2.0, "transformer": 0.5, "uvit": 0.4},
}
PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
AS_IS, COMPILED = "reference, recomputing activations", "ours, compiled"
COLUMNS = ("way", "ms", "images/s", "ratio", "GFLOP", "MiB of a step")


def bench_training(options: argparse.Namespace) -> None:
    """Prints the tables and, below, what was to be reached."""
    device = pick_device(options.device)
    options.batch = options.batch or BATCH[device.type]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.dtype}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as training.enable_tf32
    reached: list[Target] = []
    with tempfile.TemporaryDirectory() as folder:
        loader = random_loader(Path(folder), options.batch)
        for title, table in TABLES.items():
            if not options.only or any(word in title for word in options.only):
                print(f"\n{title}, {options.batch} images a step", flush=True)
                reached += table(loader, device, options)
    if reached:
        print("\n" + "\n".join(targets(*reached)))


def in_loop(loader: TokenLoader, device: torch.device, options: argparse.Namespace) -> list[Target]:
    """From the store, and with the frozen VQGAN encoding: pixels lie decoded on the device, which
    is generous, since JPEGs must be read, decoded and cropped."""
    vq = pictures.maskgit_jax.MaskGitVQGAN().to(device).eval().requires_grad_(False)  # f16
    shape = (options.batch, 3, RESOLUTION, RESOLUTION)
    pixels = torch.zeros(shape, dtype=torch.uint8, device=device).random_()
    dtype = options.torch_dtype

    def encoded(step: int) -> Batch:
        batch = loader.batch(step)
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            batch.codes = vq.encode(pixels.float().div(255))
        return batch

    print("\n".join(head(*COLUMNS)))
    best = 0.0
    for size in [options.size] if options.size else SIZES[device.type]:
        model = MaskGitTransformer(**IMAGENET | size_fields(size)).to(device)
        ways = {
            "VQGAN in the loop": our_step(model, encoded, device, dtype),
            "from the store": our_step(deepcopy(model), loader.batch, device, dtype),
        }
        best = max(best, *compare(f"{size}: ", ways, device, options).values())
    asked = ASKED[device.type].get("in the loop")
    return [("times the images/s with the VQGAN in the loop, the best size", best, asked or 1.0)]


def beside_reference(
    loader: TokenLoader, device: torch.device, options: argparse.Namespace
) -> list[Target]:
    """The reference's step on the same weights and masked batches, as its imagenet.yaml has it, and
    without recomputing activations, as ours is."""
    if options.reference is None:
        print("left out: it needs --reference FOLDER, a checkout of open-muse")
        return []
    ours = MaskGitTransformer(**IMAGENET | (size_fields(options.size) if options.size else {}))
    theirs = import_reference(options.reference).MaskGitTransformer(**asdict(ours.config))
    theirs.load_state_dict(ours.state_dict())
    ours, theirs, dtype = ours.to(device), theirs.to(device), options.torch_dtype
    ways = {
        "reference": reference_step(theirs, ours, loader.batch, device, dtype, False),
        "ours": our_step(ours, loader.batch, device, dtype),
    }
    if options.compile:
        compiled = deepcopy(ours)
        ways[COMPILED] = our_step(compiled, loader.batch, device, dtype, compiled=True)
    losses = [float(way()) for way in ways.values()]
    as_is = reference_step(theirs, ours, loader.batch, device, dtype, True)
    ways = {AS_IS: as_is, **ways}
    print(f"loss of the first step: {', '.join(f'{loss:.6f}' for loss in losses)}\n")
    print("\n".join(head(*COLUMNS)))
    times = compare("", ways, device, options)
    best, asked = max(times["ours"], times.get(COMPILED, 0.0)), ASKED[device.type]["reference"]
    return [
        ("times the reference's training step", best, asked),
        ("times the same that recomputes nothing", best / times["reference"], asked),
    ]


def compare(
    title: str, ways: dict[str, Way], device: torch.device, options: argparse.Namespace
) -> dict[str, float]:
    """Times the ways, prints their lines, and gives their speeds over the first's."""
    measured = measure(ways, device, options.rounds)
    flops = {name: count_flops(way) for name, way in ways.items() if "compiled" not in name}
    first = next(iter(measured.values())).ms
    for name, (ms, peak) in measured.items():
        rate, work = f"{1e3 * options.batch / ms:.3g}", flops.get(name)
        gflop = f"{work / 1e9:,.0f}" if work else ""
        cells = f"{ms:,.0f}", rate, f"{first / ms:.2f}", gflop, f"{peak:,.0f}"
        print(line(title + name, *cells), flush=True)
    return {name: first / ms for name, (ms, _) in measured.items()}


def shares_of_peak(
    loader: TokenLoader, device: torch.device, options: argparse.Namespace
) -> list[Target]:
    """Both architectures, float32 and bfloat16, eager and compiled."""
    columns = "model|dtype|way|ms|images/s|tokens/s|MFU|waits for data|peak MiB"
    print("\n".join(head(*columns.split("|"))))
    asked, reached = ASKED[device.type], []
    for name in MODELS:
        best = 0.0
        for dtype in (torch.float32, torch.bfloat16):
            for compiled in (False, True)[: 1 + options.compile]:
                mfu = share_of_peak(name, dtype, compiled, loader, device, options)
                best = max(best, mfu)
                gc.collect()
                torch._dynamo.reset()
        if name in asked:
            reached.append((f"MFU of the {name}, the best way", best, asked[name]))
    for dtype in (torch.float32, torch.bfloat16):
        peak = yardstick(device, PRECISIONS[dtype], enable_tf32=True)
        print(f"MFU in {dtype_name(dtype)}: of {peak.tflops:.3g} TFLOP/s, {peak.source}")
    return reached


def share_of_peak(
    name: str,
    dtype: torch.dtype,
    compiled: bool,
    loader: TokenLoader,
    device: torch.device,
    options: argparse.Namespace,
) -> float:
    """Prints one line; gives the MFU: operations of model and loss over what the peak allows."""
    fields = size_fields(options.size or "large", name)
    published = IMAGENET if name == "transformer" else {}
    model, clock = MODELS[name](**published | fields).to(device), Clock(device)
    flops = count_flops(our_step(model, loader.batch, device, dtype))  # before it is compiled
    way = our_step(model, loader.batch, device, dtype, compiled, clock)
    ms, _ = measure({name: way}, device, options.rounds)[name]
    waits = share_of_waiting(way, clock, device, options.rounds)
    peak = yardstick(device, PRECISIONS[dtype], enable_tf32=True)
    mfu, rate = flops / (ms / 1e3 * peak.tflops * 1e12), 1e3 * options.batch / ms
    title = f"{name}, {count_parameters(model) / 1e6:,.0f} M"
    cells = dtype_name(dtype), "compiled" if compiled else "eager", f"{ms:,.0f}", f"{rate:.3g}"
    shares = f"{rate * CODES:,.0f}", f"{mfu:.1%}", f"{waits:.2%}", f"{peak_mib(device):,.0f}"
    print(line(title, *cells, *shares), flush=True)
    return mfu


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


TABLES = {
    "From the store, and with the VQGAN in the loop": in_loop,
    "Beside the reference": beside_reference,
    "MFU": shares_of_peak,
}
