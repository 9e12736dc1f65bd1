"""Geometry: where a square lies in an image, and the image resized to it.

The whole image with its shorter side made R, then the centre: torchvision's Resize(R) and
CenterCrop(R), bit for bit. Random squares are cut first and resized then. H x W pixels.
"""

import numpy as np
import torch
from PIL import Image

MAX_ASPECT = 8  # of an image that is resized as a whole; of a longer one that would be wasteful
Box = tuple[float, float, float, float]  # top, left, height, width


def centre_box(height: int, width: int, resolution: int) -> Box:
    """The square in an image of height x width that Resize and CenterCrop keep."""
    rows, columns = resized(height, width, resolution)
    top, left = _middle(rows, resolution), _middle(columns, resolution)
    return (
        top * height / rows,
        left * width / columns,
        resolution * height / rows,
        resolution * width / columns,
    )


def resized(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(rows, columns) of the image when its shorter side has become `resolution`."""
    long = int(resolution * max(height, width) / min(height, width))
    return (resolution, long) if height <= width else (long, resolution)


def centre_square(
    image: torch.Tensor, height: int, width: int, shrink: int, resolution: int
) -> torch.Tensor:
    """(3, h, w) uint8 -> the centre square (3, R, R).

    height, width: of the original, of which `image` is the part 1 / shrink, sides rounded up.
    """
    rows, columns = resized(height, width, resolution)
    if max(height, width) > MAX_ASPECT * min(height, width):
        return _by_pillow(image, centre_box(height, width, resolution), shrink, resolution)
    scales = (shrink * rows / height, shrink * columns / width) if shrink > 1 else None
    whole = _resize(image, rows, columns, scales)
    top, left = _middle(rows, resolution), _middle(columns, resolution)
    return whole[:, top : top + resolution, left : left + resolution]


def square(
    image: torch.Tensor, top: int, left: int, side: int, shrink: int, resolution: int
) -> torch.Tensor:
    """(3, h, w) uint8 -> the square of `side` pixels of the original there, as (3, R, R)."""
    first_row, first_column = top // shrink, left // shrink
    bottom, right = (-(-(start + side) // shrink) for start in (top, left))
    cut = image[:, first_row:bottom, first_column:right]
    if shrink == 1:
        return _resize(cut, resolution, resolution)
    box = (top - shrink * first_row, left - shrink * first_column, side, side)
    return _by_pillow(cut, box, shrink, resolution)


def _resize(
    image: torch.Tensor, rows: int, columns: int, scales: tuple[float, float] | None = None
) -> torch.Tensor:
    """Bilinear, antialiased: (3, h, w) -> (3, rows, columns) uint8. scales: if not by the sizes."""
    if tuple(image.shape[1:]) == (rows, columns) and scales is None:
        return image
    batch = _row_by_row(image) if image.device.type == "cpu" else image.float()  # no uint8 on a GPU
    made = torch.ops.aten._upsample_bilinear2d_aa(
        batch[None], [rows, columns], False, *(scales or (None, None))
    )[0]
    return made if made.dtype == torch.uint8 else made.round().clamp(0, 255).to(torch.uint8)


def _row_by_row(image: torch.Tensor) -> torch.Tensor:
    """(3, h, w), in memory (h, w, 3), which is what torch resizes fastest.

    Copied by NumPy if need be: torch would start a team of threads for each thread that decodes.
    """
    rows = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return torch.from_numpy(rows).permute(2, 0, 1)


def _by_pillow(image: torch.Tensor, box: Box, shrink: int, resolution: int) -> torch.Tensor:
    """(3, h, w) uint8 -> the box, in pixels of the original, as (3, R, R)."""
    top, left, height, width = (length / shrink for length in box)
    pixels = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    edges = (left, top, min(left + width, pixels.width), min(top + height, pixels.height))
    small = pixels.resize((resolution, resolution), Image.Resampling.BILINEAR, box=edges)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def _middle(length: int, resolution: int) -> int:
    """Where CenterCrop begins."""
    return round((length - resolution) / 2)
