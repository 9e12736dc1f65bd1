"""How tokenize_stage.bench times encoders: uint8 pixels -> codes, ways in turns.

Every way is a process of its own, since how memory is kept is a property of the process.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tokenize_stage.cost.roofline import GPUS, ROWS, encoder_operations, images_per_s
from tokenize_stage.pipeline.encoder import Encoder, Pending, keep_heap
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.model import VQModel
from tokenize_stage.vq.paella_vq import PaellaVQModel
from tokenize_stage.vq.vqgan import VQGANModel

AMUSED = {"channel_mult": (1, 2, 2, 4, 6), "attn_resolutions": (), "no_attn_mid_block": True}
WIDTH = {"z_channels": 64, "quantized_embed_dim": 64, "num_embeddings": 8192}
MODELS: Mapping[str, Callable[[], VQModel]] = {
    "MaskGitVQGAN f16-1024": MaskGitVQGAN,
    "VQGANModel f16-8192": lambda: VQGANModel(**AMUSED, **WIDTH),
    "PaellaVQModel f8-8192": lambda: PaellaVQModel(levels=3),
}


@dataclass(frozen=True)
class EncodeWay:
    """dtype of the convolutions; ours: by Encoder, else as the reference does it."""

    dtype: str
    ours: bool = True
    compile: bool = False


CPU_WAYS = {
    "the reference's": EncodeWay("float32", ours=False),
    "float32": EncodeWay("float32"),
    "bfloat16": EncodeWay("bfloat16"),
}
GPU_WAYS = CPU_WAYS | {
    "float16": EncodeWay("float16"),
    "float16, compiled": EncodeWay("float16", compile=True),
    "bfloat16, compiled": EncodeWay("bfloat16", compile=True),
}


def make_model(name: str) -> VQModel:
    """With random weights, in which all codes may be used."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    nn.init.normal_(model.quantizer.vectors, std=0.3)
    return model


def time_encoders(
    model: str,
    ways: Mapping[str, EncodeWay],
    resolution: int,
    batch_size: int,
    device: str,
    seconds: float,
    turns: int,
) -> dict[str, list[float]]:
    """Way -> images a second, a number a turn."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with ExitStack() as stack:
        pools = {
            name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in ways
        }
        for turn in range(turns + 1):
            for name, way in ways.items():
                timed = pools[name].submit(
                    encode_for, model, way, resolution, batch_size, device, turn and seconds
                )
                if turn:  # the first loads, compiles, and chooses kernels
                    rates[name].append(timed.result())
                else:
                    timed.result()
    return rates


def encode_for(
    model: str, way: EncodeWay, resolution: int, batch_size: int, device: str, seconds: float
) -> float:
    """Images a second, at least a batch; one batch is always ahead. For a process of its own."""
    submit = _submit(model, way, resolution, batch_size, device)
    draw = np.random.default_rng(0).integers
    pixels = draw(256, size=(batch_size, 3, resolution, resolution), dtype=np.uint8)
    start, pending, count = time.perf_counter(), submit(pixels), 1
    while time.perf_counter() - start < seconds:
        following, count = submit(pixels), count + 1
        pending.result()
        pending = following
    pending.result()
    return count * batch_size / (time.perf_counter() - start)


@cache
def _submit(
    model: str, way: EncodeWay, resolution: int, batch_size: int, device: str
) -> Callable[[np.ndarray], "Pending | Done"]:
    vq = make_model(model)
    if not way.ours:
        vq = vq.to(device)
        return lambda pixels: Done({"codes": reference_codes(vq, torch.from_numpy(pixels) / 255)})
    dtype, sizes = getattr(torch, way.dtype), {"codes": resolution}
    encoder = Encoder({"codes": vq}, sizes, torch.device(device), dtype, batch_size, way.compile)
    return lambda pixels: encoder.submit({resolution: pixels})


@dataclass
class Done:
    """Codes that need not be waited for."""

    codes: dict[str, np.ndarray]

    def result(self) -> dict[str, np.ndarray]:
        return self.codes


@torch.no_grad()
def reference_codes(vq: VQModel, pixels: torch.Tensor) -> np.ndarray:
    """Pixels (B, 3, R, R) float32 in [0, 1] -> codes (B, N), as the reference encodes: float32 and
    NCHW. In its favour, zeros are padded inside of the convolutions."""
    return vq.encode(pixels.to(vq.quantizer.vectors.device)).cpu().numpy()


def limit(model: str, resolution: int, device: str, way: EncodeWay) -> float:
    """Images a second that no way in that dtype can exceed."""
    dtype = getattr(torch, way.dtype)
    operations = encoder_operations(MODELS[model](), resolution, dtype)
    if device == "cuda":
        return images_per_s(operations, GPUS["H100"], way.dtype != "float32", way.compile)
    return convolution_flops(way.dtype) * ROWS / sum(one.flops for one in operations)


@cache
def convolution_flops(dtype: str) -> float:
    """Operations a second of a 3x3 convolution of 128 channels at 256 px here, in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_time_convolution, dtype).result()


@torch.inference_mode()
def _time_convolution(dtype: str) -> float:
    keep_heap()
    options = {"dtype": getattr(torch, dtype)}
    x = torch.randn(1, 128, 256, 256, **options).to(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, **options).to(memory_format=torch.channels_last)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        F.conv2d(x, weight, padding=1)
        best = min(best, time.perf_counter() - start)
    return 2 * 128 * 128 * 9 * 256 * 256 / best
