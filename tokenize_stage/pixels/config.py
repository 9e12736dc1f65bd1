"""Options of step 2 (dataset.preprocessing.*); each field's sentence is its --help."""

from dataclasses import dataclass, field
from typing import Literal

VIEWS = ("centre", "centre_flip", "random", "random_flip")


@dataclass
class PreprocessingConfig:
    resolution: int = 256
    """Side of the square, in pixels, that each image is resized and cropped to."""
    views: list[str] = field(default_factory=lambda: ["centre"])
    """Variants of each image, one row each: centre, centre_flip, random, random_flip; random ones
    may be repeated. The first is view 0."""
    seed: int = 0
    """Of the random views."""
    min_scale: float = 1.0
    """Random squares have a side drawn from [min_scale, 1] times the shorter side."""
    dct_scaling: float = 4.0
    """JPEGs are decoded at 1/2, 1/4 or 1/8 of their size as long as this many times the
    resolution is left; 0: always in full. Codes of large photographs that change: 2.1 % at 1, 0.45
    % at 2, 0.06 % at 4 (rounding pixels to 8 bits: 0.09 %). Decoding on a GPU is always in full."""
    decode_device: Literal["cpu", "cuda"] = "cpu"
    """Where plain JPEGs are decoded and resized; cuda (nvJPEG) gives slightly other pixels."""

    def __post_init__(self) -> None:
        def refuse(key: str, value: object, legal: str) -> ValueError:
            return ValueError(f"dataset.preprocessing.{key}={value}: {legal}")

        if self.resolution < 1:
            raise refuse("resolution", self.resolution, "it must be at least 1")
        if self.seed < 0:
            raise refuse("seed", self.seed, "it must be at least 0")
        if not 0 < self.min_scale <= 1:
            raise refuse("min_scale", self.min_scale, "it must be in (0, 1]")
        if self.dct_scaling != 0 and not self.dct_scaling >= 1:
            raise refuse("dct_scaling", self.dct_scaling, "it must be 0 or at least 1")
        unknown = [name for name in self.views if name not in VIEWS]
        if unknown or not self.views:
            raise refuse("views", self.views, f"legal are {', '.join(VIEWS)}, one or more")
        centres = [name for name in self.views if name.startswith("centre")]
        if len(set(centres)) < len(centres):
            raise refuse("views", self.views, "centre and centre_flip may come once each")
