"""The bytes of one image -> upright RGB pixels, or why there are none.

Every kind of picture has one defined meaning:
  EXIF orientation              applied first; sizes and crop boxes are those of the upright image
  1, L, P, YCbCr, RGB           as Pillow converts them to RGB (16-bit colour: its high bytes)
  LA, RGBA, PA, "transparency"  laid over white
  I;16 (16-bit gray), I         0..65535 -> round(value / 257); I beyond that range is refused
  F (floating point gray)       0..1 -> round(value * 255); anything beyond, or NaN, is refused
  CMYK                          255 * (1 - C) * (1 - K) and so on; ICC profiles are not applied
  animated GIF, WebP, PNG       the first frame
  more than MAX_PIXELS pixels   refused before anything is decoded
"""

from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from io import BytesIO
from threading import Lock

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

from tokenize_stage.pixels.resize import centre_box, centre_square

MAX_PIXELS = 89_478_485  # Pillow's own threshold of suspicion: a quarter of a gigabyte as RGB
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no EPS: it runs a program
Image.init()  # loads the readers before any threads do
Image.core.set_block_size(1 << 28)  # pieces of 16 MB would stay in the heap of each thread
LARGE_PIXELS = 2**24  # a larger image takes up to 0.7 GB until it is resized: one at a time
_one_large = Lock()
BAND = 1 << 22  # pixels brought to RGB at once: all of a large image would need twice the memory
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = (5, 6, 7, 8)  # orientations that exchange height and width


class BadImage(ValueError):
    """Bytes that do not give a picture; the message says why."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One view of an image, at every resolution asked for: pixels (3, R, R) uint8 RGB.

    The crop box is in pixels of the original, upright image, and that of the first resolution.
    """

    pixels: tuple[np.ndarray, ...]
    original_height: int
    original_width: int
    crop_top: float
    crop_left: float
    crop_height: float
    crop_width: float
    view: int = 0
    flipped: bool = False
    phash: str | None = None  # 16 hex digits, of the whole image


@dataclass(frozen=True, eq=False)
class Rgb:
    """An upright image: pixels (3, h, w) uint8, in memory (h, w, 3).

    height, width: of the original, of which the pixels are the part 1 / shrink, rounded up.
    """

    pixels: torch.Tensor
    height: int
    width: int
    shrink: int = 1


def decode_image(data: bytes, resolution: int) -> Picture:
    """Decodes an image, resizes its shorter side to `resolution` and crops the centre.

    Raises BadImage for bytes that cannot be decoded or have no defined meaning.
    """
    with in_turn(data):
        image = decode_rgb(data)
        pixels = centre_square(image.pixels, image.height, image.width, image.shrink, resolution)
    box = centre_box(image.height, image.width, resolution)
    return Picture((as_array(pixels),), image.height, image.width, *box)


def as_array(pixels: torch.Tensor) -> np.ndarray:
    """(3, R, R) in C order, and not a part of a whole image that would stay in memory.

    Copied by NumPy: torch would start a team of threads for each thread that decodes.
    """
    return np.array(pixels.cpu().numpy(), order="C")


def in_turn(data: bytes) -> AbstractContextManager[object]:
    """What is held from decoding an image to having resized it: a lock if it is large."""
    with suppress(Exception):  # what is wrong with the bytes, decoding will say
        image = open_image(data)
        if image.width * image.height > LARGE_PIXELS:
            return _one_large
    return nullcontext()


def decode_rgb(data: bytes, shortest: int | None = None, device: str = "cpu") -> Rgb:
    """Decodes an image to upright RGB.

    shortest: a JPEG may come out smaller, by 2, 4 or 8, as long as its shorter side has so many
    pixels. device: of the decoder for plain JPEGs, "cpu" or "cuda". Raises BadImage.
    """
    try:
        return _decode(data, shortest, device)
    except (BadImage, MemoryError, torch.OutOfMemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(f"none of the known formats ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _decode(data: bytes, shortest: int | None, device: str) -> Rgb:
    image = open_image(data)
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        is_upright = _orientation(image) not in UPRIGHT
        shrink = 1 if shortest is None else _shrink(image, shortest, is_upright)
        if shrink > 1:
            return _decode_smaller(image, shrink)
        if is_upright and (pixels := _decode_jpeg(data, device)) is not None:
            return Rgb(pixels, image.height, image.width)
    image.load()
    image = _upright(image)  # by the same name: the memory of what was turned is free now
    return _rgb(image)


def open_image(data: bytes) -> Image.Image:
    """Reads the header alone; what would take too much memory is refused by it."""
    image = Image.open(BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} is over the limit of {MAX_PIXELS:,} pixels")
    return image


def load_image(data: bytes) -> Image.Image:
    """Decodes the first frame."""
    image = open_image(data)
    image.load()
    return image


def _decode_jpeg(data: bytes, device: str) -> torch.Tensor | None:
    """(3, h, w) uint8 by libjpeg-turbo, or on a GPU nvJPEG; None for what Pillow is to judge."""
    if device != "cpu" and b"\xff\xd9" not in data[-64:]:
        return None  # no end of image: truncated, which nvJPEG may pass over
    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_jpeg(encoded, ImageReadMode.RGB, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def _shrink(image: Image.Image, shortest: int, is_upright: bool) -> int:
    """By how much a JPEG's decoder may shrink it, 1, 2, 4 or 8.

    Sides are rounded up, at the right and the bottom; turned, the surplus would lie elsewhere.
    """
    fits = (n for n in (8, 4, 2) if min(image.size) >= n * shortest)
    return next((n for n in fits if is_upright or not (image.width % n or image.height % n)), 1)


def _decode_smaller(image: Image.Image, shrink: int) -> Rgb:
    """A JPEG of which only the low frequencies are decoded."""
    width, height = image.size
    image.draft(None, (width // shrink, height // shrink))
    image.load()
    small = _rgb(_upright(image))
    if _orientation(image) in TURNED:
        width, height = height, width
    return Rgb(small.pixels, height, width, shrink)


def _rgb(image: Image.Image) -> Rgb:
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = np.asarray(_to_rgb(image.crop((0, top, image.width, bottom))))
    return Rgb(torch.from_numpy(pixels).permute(2, 0, 1), image.height, image.width)


def upright_rgb(image: Image.Image) -> Image.Image:
    """EXIF orientation applied, 8-bit RGB, what is transparent over white; see the module."""
    return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken metadata beside sound pixels: as if there were none
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits -> L, or LA where one gray value is declared transparent."""
    values = np.asarray(image)  # (H, W)
    highest = 1.0 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= highest):
        found = f"{values.min()}..{values.max()}"
        raise BadImage(f"gray values {found} of mode {image.mode} are not in 0..{highest}")
    gray = Image.fromarray(np.rint(values * (255 / highest)).astype(np.uint8))
    if "transparency" in image.info:
        opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        gray.putalpha(Image.fromarray(opaque))
    return gray
