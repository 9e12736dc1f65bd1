"""Images through steps 2 and 3 once more: the way a store was made, exactly, or in another way."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from tokenize_stage.pipeline.encoder import Encoder
from tokenize_stage.pixels.config import PreprocessingConfig
from tokenize_stage.pixels.decode import BadImage, Picture, load_image, upright_rgb
from tokenize_stage.pixels.resize import centre_box
from tokenize_stage.pixels.views import Decoder, View
from tokenize_stage.quality.drawn_rows import DrawnRow
from tokenize_stage.vq import load_vq_model


@dataclass(frozen=True)
class Way:
    """How pixels are made of images (None: by Pillow), and codes of pixels."""

    preprocessing: PreprocessingConfig | None = None
    dtype: str = "float32"
    is_tf32: bool = False
    is_compiled: bool = False


EXACT = Way()


def way_of(name: str, preprocessing: PreprocessingConfig) -> Way:
    """The exact way with one thing changed; name: of AuditConfig.compare."""
    scaling = preprocessing.dct_scaling or PreprocessingConfig().dct_scaling
    full = dataclasses.replace(preprocessing, dct_scaling=0.0, decode_device="cpu")
    ways = {
        "float16": Way(dtype="float16"),
        "bfloat16": Way(dtype="bfloat16"),
        "tf32": Way(is_tf32=True),
        "compile": Way(is_compiled=True),
        "full_decode": Way(full),
        "dct_scaling": Way(dataclasses.replace(full, dct_scaling=scaling)),
        "gpu_decode": Way(dataclasses.replace(full, decode_device="cuda")),
    }
    return ways[name]


def make_pictures(
    rows: Sequence[DrawnRow],
    images: Mapping[int, bytes],
    preprocessing: PreprocessingConfig,
    resolutions: Sequence[int],
) -> tuple[dict[int, Picture], list[str], dict[str, Any]]:
    """(Row number -> its picture, why others have none, what store.json would say of it)."""
    decoder = Decoder(preprocessing, resolutions)

    def make(row: DrawnRow) -> Picture | str:
        data = images[row.number]
        try:
            pictures = decoder.decode(data, sha256(data).hexdigest())
        except BadImage as error:
            return f"row {row.number}: bad image: {error}"
        found = [picture for picture in pictures if picture.view == row.view]
        return found[0] if found else f"row {row.number}: there is no view {row.view} configured"

    wanted = [row for row in rows if row.number in images]
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(make, wanted))
    pictures = {
        row.number: picture
        for row, picture in zip(wanted, made, strict=True)
        if not isinstance(picture, str)
    }
    problems = [problem for problem in made if isinstance(problem, str)]
    return pictures, problems, decoder.transform()


def by_pillow(data: bytes, picture: Picture, view: View, resolutions: Sequence[int]) -> Picture:
    """The same crop of the image, all of it decoded, cut and resized by Pillow."""
    image = upright_rgb(load_image(data))
    pixels = []
    for resolution in resolutions:
        top, left, height, width = (
            centre_box(image.height, image.width, resolution)
            if view.kind == "centre"
            else (picture.crop_top, picture.crop_left, picture.crop_height, picture.crop_width)
        )
        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        small = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
        if view.flip:
            small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels.append(np.asarray(small).transpose(2, 0, 1))
    return dataclasses.replace(picture, pixels=tuple(pixels))


def encode_pictures(
    pictures: Sequence[Picture],
    places: Mapping[str, str],
    resolutions: Mapping[str, int],
    way: Way,
    device: torch.device,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Column -> codes (n, N) of n pictures; places: of the tokenizers, by column."""
    sizes = list(dict.fromkeys(resolutions.values()))
    models = {column: load_vq_model(place) for column, place in places.items()}
    if way.is_tf32:
        for model in models.values():
            emulate_tf32(model)
    encoder = Encoder(
        models,
        resolutions,
        device,
        getattr(torch, way.dtype),
        batch_size,
        way.is_compiled,
    )
    parts: list[Mapping[str, np.ndarray]] = []
    for first in tqdm(range(0, len(pictures), batch_size), "encode", disable=None, leave=False):
        batch = pictures[first : first + batch_size]
        pixels = {
            size: np.stack([p.pixels[place] for p in batch]) for place, size in enumerate(sizes)
        }
        parts.append(encoder.submit(pixels).result())
    return {column: np.concatenate([part[column] for part in parts]) for column in places}


def emulate_tf32(model: nn.Module) -> None:
    """From now on, layers that multiply see weights and inputs of TF32's 10 bits of mantissa.

    The sums stay in float32, as on a GPU; so it needs none.
    """

    def narrow(values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)

    def narrow_input(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (narrow(given[0]), *given[1:])

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = narrow(layer.weight.data)
            layer.register_forward_pre_hook(narrow_input)
