"""How tokenize_stage.bench times decoders: the bytes of JPEGs -> pixels (3, R, R)."""

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle, islice
from statistics import median

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tokenize_stage.pixels.config import PreprocessingConfig
from tokenize_stage.pixels.views import Decoder

Way = Callable[[bytes], np.ndarray]
REFERENCE = "reference steps (Pillow, float32 resize)"


def decode_ways(resolution: int) -> dict[str, Way]:
    """Ours, with and without DCT scaling, and others."""
    simplejpeg = {"simplejpeg and torch": partial(by_simplejpeg, resolution=resolution)}
    return {
        "ours": ours(resolution, PreprocessingConfig().dct_scaling),
        "ours, decoded in full": ours(resolution, 0),
        "torchvision": partial(by_torchvision, resolution=resolution),
        **(simplejpeg if find_spec("simplejpeg") else {}),
        "Pillow": partial(by_pillow, resolution=resolution),
        REFERENCE: partial(by_reference_steps, resolution=resolution),
    }


def ours(resolution: int, dct_scaling: float) -> Way:
    """The decoder of muse-tokenize."""
    options = PreprocessingConfig(resolution=resolution, dct_scaling=dct_scaling)
    decoder = Decoder(options, [resolution])
    return lambda data: decoder.decode(data, "0" * 64)[0].pixels[0]


def by_torchvision(data: bytes, resolution: int) -> np.ndarray:
    """libjpeg-turbo, then torch's resize of uint8."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return _centre(decode_jpeg(encoded, ImageReadMode.RGB), resolution)


def by_simplejpeg(data: bytes, resolution: int) -> np.ndarray:
    """libjpeg-turbo by another binding, then torch's resize of uint8."""
    pixels = import_module("simplejpeg").decode_jpeg(data)
    return _centre(torch.from_numpy(pixels).permute(2, 0, 1), resolution)


def by_pillow(data: bytes, resolution: int) -> np.ndarray:
    """Pillow's decoder and resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(v2.CenterCrop(resolution)(v2.Resize(resolution)(image))).transpose(2, 0, 1)


def by_reference_steps(data: bytes, resolution: int) -> np.ndarray:
    """Pillow's decoder, float32 in [0, 1], a float resize, a crop; rounded for comparison alone."""
    return (reference_pixels(Image.open(io.BytesIO(data)), resolution) * 255).round().byte().numpy()


def reference_pixels(image: Image.Image, resolution: int) -> torch.Tensor:
    """(3, R, R) float32 in [0, 1], the reference's way."""
    pixels = F.to_dtype(F.pil_to_tensor(image.convert("RGB")), torch.float32, scale=True)
    resized = F.resize(pixels, [resolution], antialias=True)
    return F.center_crop(resized, [resolution, resolution])


def _centre(pixels: torch.Tensor, resolution: int) -> np.ndarray:
    resized = F.resize(pixels, [resolution], antialias=True)
    return F.center_crop(resized, [resolution, resolution]).contiguous().numpy()


def time_decoding(
    data: Sequence[bytes], resolution: int, threads: int, seconds: float, turns: int
) -> dict[str, list[float]]:
    """Way -> images a second, a number a turn."""
    ways, before = decode_ways(resolution), torch.get_num_threads()
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with ThreadPoolExecutor(threads) as pool:
        for name, way in (way for _ in range(turns) for way in ways.items()):
            endless, done, start = cycle(data), 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < seconds or not done:
                done += len(list(pool.map(way, islice(endless, 8 * threads))))
            rates[name].append(done / passed)
    torch.set_num_threads(before)
    return rates


def psnr(data: Sequence[bytes], resolution: int) -> dict[str, str]:
    """Way -> median PSNR of its pixels against the reference's steps."""
    ways = decode_ways(resolution)
    expected = [ways[REFERENCE](one).astype(np.float64) for one in data]
    near = {}
    for name, way in ways.items():
        errors = [np.square(way(x) - y).mean() for x, y in zip(data, expected, strict=True)]
        near[name] = "∞" if not any(errors) else f"{10 * np.log10(255**2 / median(errors)):.1f}"
    return near
