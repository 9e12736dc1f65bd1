"""pHash: the bits of the ImageHash library, alike for likes, none for a flat picture."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tokenize_stage.pixels.config import PreprocessingConfig
from tokenize_stage.pixels.decode import decode_rgb
from tokenize_stage.pixels.perceptual_hash import phash
from tokenize_stage.pixels.views import Decoder


def blobs(seed: int, height: int = 300, width: int = 400) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def hash_of(image: Image.Image) -> str | None:
    return phash(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def distance(one: str | None, other: str | None) -> int:
    assert one is not None and other is not None
    return (int(one, 16) ^ int(other, 16)).bit_count()


# imagehash.phash(blobs(seed, height, width)) of ImageHash 4.3.2
GOLDEN = {
    (0, 300, 400): "fc9848e313c4ae3b",
    (1, 300, 400): "8ce3d8b83acbc534",
    (2, 640, 200): "fc6c8d47db2420da",
    (3, 31, 33): "dd79e29cd5ee0011",
    (4, 8, 500): "9141a6a6c2857f7b",
    (5, 1, 1000): "ce00000000000000",
}


@pytest.mark.parametrize("seed, height, width", GOLDEN)
def test_hashes_are_those_of_the_imagehash_library(seed: int, height: int, width: int) -> None:
    assert hash_of(blobs(seed, height, width)) == GOLDEN[seed, height, width]


@pytest.mark.parametrize("seed", range(4))
def test_scaled_and_compressed_copies_are_close_and_other_pictures_far(seed: int) -> None:
    image = blobs(seed)
    buffer = io.BytesIO()
    image.resize((250, 180)).save(buffer, "JPEG", quality=40)
    copy = phash(decode_rgb(buffer.getvalue()).pixels)
    assert distance(hash_of(image), copy) <= 4
    assert distance(hash_of(image), hash_of(blobs(seed + 10))) >= 16


def test_a_picture_without_structure_has_no_hash() -> None:
    noise = np.random.default_rng(0).integers(100, 104, (64, 64, 3), np.uint8)
    assert hash_of(Image.new("RGB", (64, 64), "navy")) is hash_of(Image.fromarray(noise)) is None


def test_each_view_tells_the_hash_of_the_whole_image_when_asked() -> None:
    buffer = io.BytesIO()
    blobs(1).save(buffer, "PNG")
    options = PreprocessingConfig(views=["centre", "random_flip"])
    pictures = Decoder(options, [16], phash=True).decode(buffer.getvalue(), "0" * 64)
    assert [picture.phash for picture in pictures] == [hash_of(blobs(1))] * 2
    assert Decoder(options, [16]).decode(buffer.getvalue(), "0" * 64)[0].phash is None
