"""Step 2, pixels: the bytes of one image -> its views at every resolution, from one decoding.

    Decoder(preprocessing, [256]).decode(data, image_hash)  ->  [Picture, …], one a view

A view is the centre of the image or a random square of it, flipped or not. Random squares are drawn
from (seed, hash of the image's bytes, number of the view) and nothing else: an image has the same
views wherever it lies and whoever encodes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from tokenize_stage.pixels.config import PreprocessingConfig
from tokenize_stage.pixels.decode import Picture, Rgb, as_array, decode_rgb, in_turn
from tokenize_stage.pixels.perceptual_hash import phash
from tokenize_stage.pixels.resize import centre_box, centre_square, square


@dataclass(frozen=True)
class View:
    """One of the variants of each image; `number` is its place in the configuration."""

    number: int
    kind: Literal["centre", "random"]
    flip: bool


def parse_views(names: Sequence[str]) -> tuple[View, ...]:
    """The views of `dataset.preprocessing.views`, which has checked the names."""
    return tuple(
        View(number, "random" if name.startswith("random") else "centre", name.endswith("_flip"))
        for number, name in enumerate(names)
    )


class Decoder:
    """Makes the pictures of a configuration; holds no state, so threads may share it."""

    def __init__(
        self,
        preprocessing: PreprocessingConfig,
        resolutions: Sequence[int],
        phash: bool = False,
        gpu: str = "cuda",
    ):
        """resolutions: sides of the squares in pixels; phash: whether pictures tell theirs; gpu:
        which one decodes where decode_device=cuda."""
        self.preprocessing, self.resolutions = preprocessing, tuple(resolutions)
        self.views, self.phash = parse_views(preprocessing.views), phash
        if preprocessing.decode_device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "dataset.preprocessing.decode_device=cuda: this machine has no CUDA device; use cpu"
            )
        smallest = preprocessing.min_scale if any(v.kind == "random" for v in self.views) else 1.0
        wanted = math.ceil(preprocessing.dct_scaling * max(self.resolutions) / smallest)
        self._shortest = wanted if wanted and preprocessing.decode_device == "cpu" else None
        self._device = "cpu" if preprocessing.decode_device == "cpu" else gpu

    def decode(self, data: bytes, image_hash: str) -> list[Picture]:
        """One picture a view. image_hash: sha256 of the data, in hex. Raises BadImage."""
        with in_turn(data):
            image = decode_rgb(data, self._shortest, self._device)
            digest = phash(image.pixels) if self.phash else None
            return [self._picture(image, view, image_hash, digest) for view in self.views]

    def transform(self) -> dict[str, Any]:
        """What store.json says about the making of the pixels."""
        said: dict[str, Any] = {
            "orientation": "EXIF applied",
            "alpha": "over white",
            "resize": "shorter side, bilinear, antialiased, uint8",
            "crop": "centre",
            "dct_scaling": self.preprocessing.dct_scaling if self._shortest else 0.0,
        }
        if self.preprocessing.views != ["centre"]:
            said["views"] = list(self.preprocessing.views)
        if any(view.kind == "random" for view in self.views):
            said |= {"seed": self.preprocessing.seed, "min_scale": self.preprocessing.min_scale}
        if self.preprocessing.decode_device != "cpu":
            said["decode_device"] = self.preprocessing.decode_device
        return said

    def _picture(self, image: Rgb, view: View, image_hash: str, digest: str | None) -> Picture:
        if view.kind == "centre":
            squares = [
                centre_square(image.pixels, image.height, image.width, image.shrink, resolution)
                for resolution in self.resolutions
            ]
            box = centre_box(image.height, image.width, self.resolutions[0])
        else:
            top, left, side = self._draw(image, view, image_hash)
            squares = [
                square(image.pixels, top, left, side, image.shrink, resolution)
                for resolution in self.resolutions
            ]
            box = top, left, side, side
        arrays = [as_array(one) for one in squares]
        pixels = tuple(np.flip(one, 2).copy() if view.flip else one for one in arrays)
        sizes = image.height, image.width
        return Picture(pixels, *sizes, *box, view=view.number, flipped=view.flip, phash=digest)

    def _draw(self, image: Rgb, view: View, image_hash: str) -> tuple[int, int, int]:
        """(top, left, side) of a random square, in pixels of the original."""
        key = [self.preprocessing.seed, int(image_hash[:16], 16), view.number]
        rng = np.random.default_rng(key)
        scale = rng.uniform(self.preprocessing.min_scale, 1.0)
        side = max(1, round(scale * min(image.height, image.width)))
        top, left = (int(rng.integers(0, d - side + 1)) for d in (image.height, image.width))
        return top, left, side
