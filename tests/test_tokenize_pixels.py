"""Step 2: each odd kind of picture one by one, broken bytes, and the geometry of resize + crop."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from tokenize_stage.pixels import decode
from tokenize_stage.pixels.decode import (
    FORMATS,
    MAX_PIXELS,
    BadImage,
    as_array,
    decode_image,
    decode_rgb,
)
from tokenize_stage.pixels.resize import centre_box


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


QUALITY = {"JPEG": {"quality": 92}, "PNG": {}}


def photo(height: int, width: int) -> Image.Image:
    """Smooth shapes with some noise, as photographs are."""
    rng = np.random.default_rng(height * 1000 + width)
    rough = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    smooth = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC), int)
    return Image.fromarray((smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype("u1"))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(float) - other).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def plain(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (4, 4), colour)


def gray(values: object, dtype: type) -> Image.Image:
    return Image.fromarray(np.full((4, 4), values, dtype))


def palette(index: int, colours: list[int]) -> Image.Image:
    image = plain("P", index)
    image.putpalette(colours)
    return image


def animation(first: object, second: object) -> tuple[Image.Image, dict]:
    return plain("RGB", first), {"save_all": True, "append_images": [plain("RGB", second)]}


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """Of RGB colours; each row begins with a zero."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def ycck() -> bytes:
    """A CMYK JPEG relabelled in its Adobe marker: its first channel is now read as luma."""
    data = bytearray(encoded(plain("CMYK", (80, 127, 127, 0)), "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


RED, BLUE = (255, 0, 0), (0, 0, 255)
ONE_COLOUR = {
    "1": (encoded(plain("1", 1)), (255, 255, 255)),
    "1 black": (encoded(plain("1", 0)), (0, 0, 0)),
    "L": (encoded(plain("L", 77)), (77, 77, 77)),
    "L, its gray declared transparent": (encoded(plain("L", 77), transparency=77), (255,) * 3),
    "LA": (encoded(plain("LA", (0, 51))), (204, 204, 204)),
    "P": (encoded(palette(1, [1, 2, 3, 4, 5, 6])), (4, 5, 6)),
    "P, index transparent": (
        encoded(palette(1, [1, 2, 3, 4, 5, 6]), transparency=1),
        (255, 255, 255),
    ),
    "P, half transparent": (
        encoded(palette(1, [1, 2, 3, 0, 100, 200]), transparency=bytes([255, 51])),
        (204, 224, 244),
    ),
    "P GIF, transparent": (
        encoded(palette(1, [1, 2, 3, 4, 5, 6]), "GIF", transparency=1),
        (255, 255, 255),
    ),
    "I;16 low byte counts": (encoded(gray(129 * 257 - 129, np.uint16)), (128, 128, 128)),
    "I;16 white": (encoded(gray(65535, np.uint16)), (255, 255, 255)),
    "I;16, its gray declared transparent": (
        encoded(gray(500, np.uint16), transparency=500),
        (255, 255, 255),
    ),
    "I;16 TIFF": (encoded(gray(20 * 257, np.uint16), "TIFF"), (20, 20, 20)),
    "I;16B TIFF": (encoded(Image.new("I;16B", (4, 4), 20 * 257), "TIFF"), (20, 20, 20)),
    "I from a 16-bit PGM": (
        b"P5 4 4 65535\n" + np.full((4, 4), 200 * 257, ">u2").tobytes(),
        (200, 200, 200),
    ),
    "I TIFF": (encoded(gray(65535, np.int32), "TIFF"), (255, 255, 255)),
    "F": (encoded(gray(0.2, np.float32), "TIFF"), (51, 51, 51)),
    "RGB": (encoded(plain("RGB", (1, 2, 3))), (1, 2, 3)),
    "RGB, its colour declared transparent": (
        encoded(plain("RGB", (1, 2, 3)), transparency=(1, 2, 3)),
        (255, 255, 255),
    ),
    "RGBA": (encoded(plain("RGBA", (255, 0, 0, 102))), (255, 153, 153)),
    "RGBA WebP": (encoded(plain("RGBA", (9, 9, 9, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "CMYK JPEG": (encoded(plain("CMYK", (255, 0, 0, 0)), "JPEG", quality=100), (0, 255, 255)),
    "CMYK TIFF": (encoded(plain("CMYK", (0, 51, 0, 51)), "TIFF"), (204, 163, 204)),
    "gray JPEG": (encoded(plain("L", 77), "JPEG", quality=100), (77, 77, 77)),
    "RGB JPEG": (encoded(plain("RGB", RED), "JPEG", quality=100, keep_rgb=True), RED),
    "YCCK JPEG": (ycck(), (80, 80, 80)),
    "two JPEGs in one (MPO)": (
        encoded(plain("RGB", RED), "MPO", quality=100, **animation(RED, BLUE)[1]),
        (254, 0, 0),
    ),
    "16-bit colour PNG": (png(4, 4, 16, (b"\0" + b"\x01\xff\x02\x00\x03\x80" * 4) * 4), (1, 2, 3)),
    "YCbCr JPEG": (encoded(plain("RGB", (80, 80, 80)), "JPEG", quality=100), (80, 80, 80)),
    "animated GIF": (encoded(animation(RED, BLUE)[0], "GIF", **animation(RED, BLUE)[1]), RED),
    "animated WebP": (
        encoded(animation(BLUE, RED)[0], "WEBP", lossless=True, **animation(BLUE, RED)[1]),
        BLUE,
    ),
    "animated PNG": (encoded(animation(RED, BLUE)[0], "PNG", **animation(RED, BLUE)[1]), RED),
    "BMP": (encoded(plain("RGB", (1, 2, 3)), "BMP"), (1, 2, 3)),
    "one pixel": (encoded(Image.new("RGB", (1, 1), (1, 2, 3))), (1, 2, 3)),
    "one gray pixel": (encoded(Image.new("L", (1, 1), 9), "WEBP", lossless=True), (9, 9, 9)),
}


@pytest.mark.parametrize("name", ONE_COLOUR)
def test_each_kind_of_picture_has_the_documented_colour(name: str) -> None:
    data, colour = ONE_COLOUR[name]
    (pixels,) = decode_image(data, 8).pixels
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert np.abs(pixels.reshape(3, -1).T.astype(int) - colour).max() <= ("JPEG" in name)


def test_16_bits_use_the_whole_range_of_8() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = decode_image(encoded(Image.fromarray(values)), 256).pixels[0][0]
    assert (found == np.rint(values / 257)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 20, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    picture = decode_image(data, 12)
    assert (picture.original_width, picture.original_height) == upright.size
    assert (upright.height > upright.width) == (orientation >= 5)
    expected = decode_image(encoded(upright), 12)
    assert (picture.pixels[0] == expected.pixels[0]).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16"])
def test_a_large_image_becomes_rgb_in_bands(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo(47, 31)
    if mode == "I;16":
        image = Image.fromarray(np.array(image.convert("L"), np.uint16) * 200)
    elif mode == "RGBA":
        image.putalpha(image.convert("L"))
    elif mode == "P":
        image = image.quantize(7)
    data = encoded(image, transparency=2) if mode == "P" else encoded(image)
    whole = decode_rgb(data).pixels
    monkeypatch.setattr(decode, "BAND", 100)
    assert torch.equal(decode_rgb(data).pixels, whole)
    if mode == "RGB":
        assert (whole.permute(1, 2, 0).numpy() == np.asarray(image)).all()


def test_pixels_do_not_keep_the_whole_image_in_memory() -> None:
    whole = torch.zeros(90, 90, 3, dtype=torch.uint8).permute(2, 0, 1)
    for side in (1, 20, 90):
        found = as_array(whole[:, :side, :side])
        assert found.flags.c_contiguous and not np.shares_memory(found, whole.numpy())


def test_broken_exif_beside_sound_pixels_is_ignored() -> None:
    data = encoded(plain("RGB", (1, 2, 3)), "PNG", exif=b"Exif\0\0MM\0*\xff\xff")
    assert (decode_image(data, 4).pixels[0][:, 0, 0] == (1, 2, 3)).all()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few dozen bytes that announces width x height pixels."""
    return png(width, height, 8, b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
BAD = {
    "nothing": (b"", "none of the known formats"),
    "text": (b"<html>404 not found</html>", "none of the known formats"),
    "truncated JPEG": (encoded(NOISE, "JPEG")[:1500], "truncated"),
    "truncated PNG": (encoded(NOISE)[:1500], "truncated"),
    "truncated WebP": (encoded(NOISE, "WEBP")[:700], "could not create decoder"),
    "truncated GIF": (encoded(NOISE, "GIF")[:900], "truncated"),
    "corrupt PNG": (encoded(NOISE)[:43] + b"\xff" + encoded(NOISE)[44:], "broken data stream"),
    "bomb": (bomb(50_000, 50_000), "2500000000 pixels"),
    "bomb below Pillow's own limit": (bomb(MAX_PIXELS // 8000 + 1, 8000), "over the limit"),
    "I beyond 16 bits": (encoded(gray(65536, np.int32), "TIFF"), "65536..65536 of mode I"),
    "I negative": (encoded(gray(-1, np.int32), "TIFF"), "not in 0..65535"),
    "F beyond 1": (encoded(gray(1.5, np.float32), "TIFF"), "not in 0..1.0"),
    "F not a number": (encoded(gray(np.nan, np.float32), "TIFF"), "nan..nan of mode F"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of the known formats"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_bytes_that_give_no_picture_are_refused_with_a_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadImage, match=reason):
        decode_image(data, 8)


JPEGS = {
    "baseline": encoded(photo(90, 70), "JPEG"),
    "progressive": encoded(photo(90, 70), "JPEG", progressive=True),
    "gray": encoded(photo(90, 70).convert("L"), "JPEG"),
    "restarts": encoded(photo(90, 70), "JPEG", restart_marker_blocks=3),
}


@pytest.mark.parametrize("shortest", [None, 32])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_cut_short_anywhere_is_refused(kind: str, shortest: int | None) -> None:
    data = JPEGS[kind]
    for cut in [*range(1, len(data) - 20, 37), *range(len(data) - 20, len(data))]:
        with pytest.raises(BadImage):
            decode_rgb(data[:cut], shortest)
    decode_rgb(data + b"what follows the end is no part of the image", shortest)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_broken_jpeg_gives_what_pillow_gives(kind: str) -> None:
    rng = np.random.default_rng(2)
    verdicts = []
    for _ in range(150):
        broken = bytearray(JPEGS[kind])
        start, length = int(rng.integers(2, len(broken))), int(rng.integers(1, 40))
        broken[start : start + length] = rng.bytes(length)
        try:
            expected = np.asarray(Image.open(io.BytesIO(broken), formats=FORMATS).convert("RGB"))
        except Exception:
            expected = None
        try:
            found = decode_rgb(bytes(broken)).pixels.permute(1, 2, 0).numpy()
        except BadImage:
            found = None
        assert np.array_equal(found, expected) if expected is not None else found is None
        verdicts.append(found is None)
    assert 10 < sum(verdicts) < 140


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_corruption_is_refused_or_decoded_but_raises_nothing_else() -> None:
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = np.frombuffer(encoded(NOISE, kind), np.uint8)
        for _ in range(60):
            broken = data.copy()
            where = rng.integers(0, min(len(data), 400), 4)
            broken[where] = rng.integers(0, 256, 4)
            with suppress(BadImage):
                assert decode_image(broken.tobytes(), 8).pixels[0].shape == (3, 8, 8)


SIZES = [(64, 64), (100, 64), (64, 99), (333, 500), (500, 333), (33, 31), (20, 20), (37, 290)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("height, width", SIZES)
def test_pixels_are_those_of_torchvision_to_the_bit(height: int, width: int, kind: str) -> None:
    image = photo(height, width)
    data = encoded(image, kind, **QUALITY[kind])
    whole = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    for resolution in (16, 32, 64, 200):
        crop = v2.CenterCrop(resolution)
        expected = crop(v2.Resize(resolution, antialias=True)(whole))
        found = decode_image(data, resolution).pixels[0]
        assert torch.equal(torch.from_numpy(found), expected)


@pytest.mark.parametrize("height, width", [*SIZES, (7, 301), (400, 40), (65, 1)])
def test_pixels_are_those_of_one_box_resize_by_pillow(height: int, width: int) -> None:
    image = photo(height, width)
    top, left, rows, columns = centre_box(height, width, 32)
    box = (left, top, left + columns, top + rows)
    expected = image.resize((32, 32), Image.Resampling.BILINEAR, box=box)
    found = decode_image(encoded(image), 32).pixels[0]
    assert psnr(found.transpose(1, 2, 0), np.asarray(expected)) >= 50


def test_the_crop_box_is_where_torchvision_takes_it_from() -> None:
    for height, width in [(300, 500), (500, 300), (1, 7), (1000, 999), (3, 3), (77, 91)]:
        for resolution in (1, 32, 100, 256):
            top, left, crop_height, crop_width = centre_box(height, width, resolution)
            resized = v2.Resize(resolution)(Image.new("L", (width, height)))
            assert crop_height == pytest.approx(resolution * height / resized.height)
            assert crop_width == pytest.approx(resolution * width / resized.width)
            offset = (
                round((resized.height - resolution) / 2),
                round((resized.width - resolution) / 2),
            )
            assert top == pytest.approx(offset[0] * height / resized.height)
            assert left == pytest.approx(offset[1] * width / resized.width)
            assert 0 <= top <= top + crop_height <= height + 1e-9
            assert 0 <= left <= left + crop_width <= width + 1e-9


def test_the_crop_box_is_recorded_in_pixels_of_the_original() -> None:
    picture = decode_image(encoded(Image.new("RGB", (400, 200))), 100)
    assert (picture.original_height, picture.original_width) == (200, 400)
    box = (picture.crop_top, picture.crop_left, picture.crop_height, picture.crop_width)
    assert box == (0, 100, 200, 200)


def test_a_thin_picture_is_cropped_without_being_blown_up() -> None:
    picture = decode_image(encoded(Image.new("RGB", (1, 60_000), (5, 6, 7))), 256)
    assert (picture.pixels[0] == np.array([5, 6, 7])[:, None, None]).all()
