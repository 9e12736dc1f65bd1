"""Step 2, pixels: the bytes of one image -> (3, R, R) uint8, and where in the image they lie.

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

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's own threshold of suspicion: a quarter of a gigabyte as RGB
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no EPS: it runs a program
Image.init()  # loads the readers before any threads do
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TRANSFORM = {
    "orientation": "EXIF applied",
    "alpha": "over white",
    "resize": "shorter side, bilinear, antialiased",
    "crop": "centre",
}
"""What store.json says about the making of the pixels; change it when they change."""


class BadImage(ValueError):
    """Bytes that do not give a picture; the message says why."""


@dataclass(frozen=True, eq=False)
class Picture:
    """pixels: (3, R, R) uint8 RGB. The crop box is in pixels of the original, upright image."""

    pixels: np.ndarray
    original_height: int
    original_width: int
    crop_top: float
    crop_left: float
    crop_height: float
    crop_width: float


def decode_image(data: bytes, resolution: int) -> Picture:
    """Decodes an image, resizes its shorter side to `resolution` and crops the centre.

    The geometry is that of torchvision's Resize(resolution) and CenterCrop(resolution), in one
    resampling. Raises BadImage for bytes that cannot be decoded or have no defined meaning.
    """
    try:
        image = upright_rgb(load_image(data))
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(f"none of the known formats ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise BadImage(f"{type(error).__name__}: {error}") from error
    top, left, height, width = centre_crop(image.height, image.width, resolution)
    box = (left, top, left + width, top + height)
    small = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    pixels = np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))  # (3, R, R)
    return Picture(pixels, image.height, image.width, top, left, height, width)


def centre_crop(height: int, width: int, resolution: int) -> tuple[float, float, float, float]:
    """(top, left, height, width) in the original of the square that Resize + CenterCrop keep."""
    short, long = min(height, width), max(height, width)
    resized_long = int(resolution * long / short)
    rows, columns = (resolution, resized_long) if height <= width else (resized_long, resolution)
    top, left = round((rows - resolution) / 2), round((columns - resolution) / 2)
    return (
        top * height / rows,
        left * width / columns,
        resolution * height / rows,
        resolution * width / columns,
    )


def load_image(data: bytes) -> Image.Image:
    """Decodes the first frame; what would take too much memory is refused by its header."""
    image = Image.open(BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} is over the limit of {MAX_PIXELS:,} pixels")
    image.load()
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """EXIF orientation applied, 8-bit RGB, what is transparent over white; see the module."""
    return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken metadata beside sound pixels: as if there were none
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


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
