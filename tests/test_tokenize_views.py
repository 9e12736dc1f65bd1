"""Step 2: several views of an image at several resolutions, from one decoding of its bytes."""

import io
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tokenize_stage.pixels.config import VIEWS, PreprocessingConfig
from tokenize_stage.pixels.decode import BadImage, Picture, decode_image, decode_rgb
from tokenize_stage.pixels.views import Decoder, View, parse_views

NO_SCALING: dict[str, Any] = {"dct_scaling": 0.0}


def gradient(height: int, width: int) -> Image.Image:
    """Waves so long that each scale of a JPEG holds all of them; another in each channel."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    waves = [np.sin(rows / 90 + k) + np.cos(columns / (70 + 20 * k)) for k in range(3)]
    return Image.fromarray((127.5 + 60 * np.stack(waves, 2)).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} | options))
    return buffer.getvalue()


def decoded(data: bytes, resolutions: tuple[int, ...] = (32,), **options: Any) -> list[Picture]:
    decoder = Decoder(PreprocessingConfig(**options), resolutions)
    return decoder.decode(data, sha256(data).hexdigest())


def crop_box(picture: Picture) -> tuple[float, ...]:
    return picture.crop_top, picture.crop_left, picture.crop_height, picture.crop_width


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(float) - other).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


NOISE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (150, 210, 3), np.uint8))
PHOTO = encoded(NOISE)


def test_views_are_named_in_order() -> None:
    assert parse_views(VIEWS) == (
        View(0, "centre", False),
        View(1, "centre", True),
        View(2, "random", False),
        View(3, "random", True),
    )


def test_the_centre_is_what_decode_image_gives_and_its_flip_the_exact_mirror() -> None:
    centre, mirror = decoded(PHOTO, views=["centre", "centre_flip"], **NO_SCALING)
    expected = decode_image(PHOTO, 32)
    assert (centre.pixels[0] == expected.pixels[0]).all()
    assert (mirror.pixels[0] == centre.pixels[0][:, :, ::-1]).all()
    assert crop_box(mirror) == crop_box(centre) == crop_box(expected)
    assert [(p.view, p.flipped) for p in (centre, mirror)] == [(0, False), (1, True)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_random_view_is_its_recorded_box_cut_out_and_resized(kind: str) -> None:
    data = encoded(NOISE, kind)
    whole = decode_rgb(data).pixels
    views = ["random", "random_flip", "random"]
    for picture in decoded(data, (32, 48), views=views, min_scale=0.3, **NO_SCALING):
        top, left, height, width = (int(length) for length in crop_box(picture))
        assert (top, left, height, width) == crop_box(picture) and height == width
        cut = whole[:, top : top + height, left : left + width]
        for resolution, pixels in zip((32, 48), picture.pixels, strict=True):
            expected = v2.Resize((resolution, resolution), antialias=True)(cut)
            expected = expected.flip(2) if picture.flipped else expected
            assert (pixels == expected.numpy()).all() and pixels.flags.c_contiguous


def test_random_boxes_lie_inside_the_image_and_use_all_of_it() -> None:
    decoder = Decoder(PreprocessingConfig(views=["random"] * 300, min_scale=0.25), [8])
    boxes = np.array([crop_box(p) for p in decoder.decode(PHOTO, "0" * 64)])
    ends = boxes[:, :2] + boxes[:, 2:]
    assert (boxes >= 0).all() and (ends <= (150, 210)).all()
    assert boxes[:, 2].min() < 45 and boxes[:, 2].max() > 142
    assert (boxes[:, :2] == 0).any(0).all() and (ends >= (149, 206)).any(0).all()


def test_random_boxes_depend_on_seed_hash_and_number_alone() -> None:
    def boxes(image_hash: str, resolution: int = 32, **options: Any) -> list[tuple[float, ...]]:
        config = PreprocessingConfig(min_scale=0.3, **options)
        return [crop_box(p) for p in Decoder(config, [resolution]).decode(data, image_hash)]

    data = encoded(gradient(801, 1003))
    one, two = sha256(b"one").hexdigest(), sha256(b"two").hexdigest()
    first = boxes(one, views=["random", "random"])
    assert first[0] != first[1] and len({*first, *boxes(two, views=["random", "random"])}) == 4
    assert first == boxes(one, views=["random", "random_flip"])
    assert first[1:] == boxes(one, views=["centre", "random"])[1:]
    assert first != boxes(one, views=["random", "random"], seed=1)
    for resolution, scaling in [(16, 1.0), (60, 2.0), (60, 0.0)]:  # decoded at other scales
        views = {"views": ["random", "random"], "dct_scaling": scaling}
        assert first == boxes(one, resolution, **views)


def test_a_decoder_may_be_shared_by_threads() -> None:
    decoder = Decoder(PreprocessingConfig(views=["centre", "random"], min_scale=0.5), [32, 16])
    images = [encoded(gradient(60 + 11 * n, 90)) for n in range(12)]

    def pixels(data: bytes) -> bytes:
        pictures = decoder.decode(data, sha256(data).hexdigest())
        return b"".join(array.tobytes() for picture in pictures for array in picture.pixels)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(pixels, images * 5)) == [pixels(data) for data in images] * 5


def test_each_resolution_is_as_if_it_were_the_only_one() -> None:
    (both,) = decoded(PHOTO, (64, 32), **NO_SCALING)
    for place, resolution in enumerate((64, 32)):
        assert (both.pixels[place] == decode_image(PHOTO, resolution).pixels[0]).all()
    assert crop_box(both) == crop_box(decode_image(PHOTO, 64))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("height, width", [(400, 560), (401, 567), (567, 403)])
def test_a_jpeg_decoded_smaller_has_the_same_geometry(
    height: int, width: int, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(height, width), exif=exif)
    for shortest in (200, 100, 50):
        small, full = decode_rgb(data, shortest), decode_rgb(data)
        assert (small.height, small.width) == (full.height, full.width)
        shrinks = orientation == 1 or (height, width) == (400, 560)
        assert (small.shrink > 1) or not shrinks
        lengths = [-(-length // small.shrink) for length in (full.height, full.width)]
        assert list(small.pixels.shape[1:]) == lengths
    views = {"views": ["centre", "random"], "min_scale": 0.8, "seed": 3}
    exact = decoded(data, (40,), **views, **NO_SCALING)
    for scaling in (1.0, 2.0):
        pictures = decoded(data, (40,), **views, dct_scaling=scaling)
        for full_view, view in zip(exact, pictures, strict=True):
            assert crop_box(view) == crop_box(full_view)
            assert psnr(view.pixels[0], full_view.pixels[0]) > 45
            assert np.abs(offset(view.pixels[0], full_view.pixels[0])).max() < 0.05


def offset(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """By how many pixels (down, right) `other` must be moved to become `one`, to first order."""
    slopes = np.stack([a[:, 1:-1, 1:-1].ravel() for a in np.gradient(other.astype(float))[1:]], 1)
    moved = (other.astype(float) - one)[:, 1:-1, 1:-1].ravel()
    return np.linalg.lstsq(slopes, moved, rcond=None)[0]


def test_a_jpeg_is_only_decoded_smaller_where_enough_is_left() -> None:
    data = encoded(gradient(400, 560))
    assert [decode_rgb(data, n).shrink for n in (401, 201, 200, 101, 100, 50, 1)] == [
        *(1, 1, 2, 2, 4, 8, 8)
    ]
    assert decode_rgb(encoded(gradient(400, 560), "PNG"), 50).shrink == 1


def test_random_views_keep_enough_pixels_for_the_smallest_box() -> None:
    data = encoded(gradient(400, 560))
    full = decoded(data, (40,), views=["random"] * 4, min_scale=0.25, **NO_SCALING)
    views = {"views": ["random"] * 4, "min_scale": 0.25}
    for one, other in zip(full, decoded(data, (40,), dct_scaling=2.0, **views), strict=True):
        assert (one.pixels[0] == other.pixels[0]).all()  # 400 is less than 2 x 2 x 40 / 0.25


def test_the_first_of_two_jpegs_in_one_is_decoded_smaller_too() -> None:
    first, second = gradient(400, 560), gradient(40, 56)
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert decode_rgb(data, 200).shrink == 2
    assert torch.equal(decode_rgb(data).pixels, decode_rgb(encoded(first)).pixels)


def test_transform_names_what_was_chosen() -> None:
    plain = Decoder(PreprocessingConfig(), [256]).transform()
    assert "views" not in plain and "seed" not in plain
    drawn = Decoder(PreprocessingConfig(views=["random"], seed=7, min_scale=0.5), [256])
    assert drawn.transform() == plain | {"views": ["random"], "seed": 7, "min_scale": 0.5}


@pytest.mark.parametrize(
    "key, value",
    [
        ("resolution", 0),
        ("seed", -1),
        ("min_scale", 0.0),
        ("min_scale", 1.5),
        ("dct_scaling", 0.5),
        ("dct_scaling", float("nan")),
        ("views", []),
        ("views", ["center"]),
        ("views", ["centre", "centre"]),
    ],
)
def test_illegal_options_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"dataset.preprocessing.{key}="):
        PreprocessingConfig(**{key: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_decoding_on_a_gpu_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="decode_device=cuda: .* use cpu"):
        Decoder(PreprocessingConfig(decode_device="cuda"), [32])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_either_device_gives_the_same_views_and_verdicts(device: str) -> None:
    views = {"views": ["centre", "centre_flip", "random"], "min_scale": 0.5}
    for image in (gradient(300, 420), gradient(420, 300).convert("L")):
        data = encoded(image)
        expected = decoded(data, (64, 32), **views, **NO_SCALING)
        found = decoded(data, (64, 32), **views, **NO_SCALING, decode_device=device)
        for one, other in zip(found, expected, strict=True):
            assert crop_box(one) == crop_box(other) and one.flipped == other.flipped
            for pixels, same in zip(one.pixels, other.pixels, strict=True):
                assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
                assert psnr(pixels, same) > 40
    for cut in (400, len(data) // 2, len(data) - 2):
        with pytest.raises(BadImage):
            decoded(data[:cut], decode_device=device)
