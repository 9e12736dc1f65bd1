"""Micro-conditions of rows: what a U-ViT is told about an image (step 7; Podell et al. 2023).

Five numbers, as open-muse has them: width and height of the original, where the crop begins (top,
left; in pixels after resizing), and the aesthetic score. b rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

SIZES = ("original_width", "original_height", "crop_top", "crop_left", "crop_height")
SCORE = "aesthetic_score"


def micro_conditions(
    columns: Mapping[str, Tensor], resolution: int, default_score: float
) -> Tensor:
    """Columns (b,) of SIZES and SCORE -> (b, 5) float32.

    resolution: the side that crop_height was resized to. For what is not known (NaN) rows are told
    what unknown_conditions says.
    """
    width, height, top, left, side, score = (columns[name].float() for name in (*SIZES, SCORE))
    scale = resolution / side
    told = torch.stack([width, height, top * scale, left * scale, score], dim=1)  # (b, 5)
    return torch.where(told.isnan(), unknown_conditions(resolution, default_score), told)


def unknown_conditions(resolution: int, score: float) -> Tensor:
    """Of a picture that is as large as what is made of it, and not cropped: (1, 5) float32."""
    return torch.tensor([[resolution, resolution, 0, 0, score]], dtype=torch.float32)
