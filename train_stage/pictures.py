"""Step 9, image: codes -> pictures, and picture files in and out.

The only file of stage two that knows pixels. Training never comes here; generation, evaluation
and the grids drawn during training do. Pictures are uint8 RGB (N, 3, H, W) on the CPU.
B batch, N pictures or codes an image, h x w grid of codes, R pixels a side.
"""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from storage.pretrained import model_fingerprint
from storage.schema import StoreMismatch, Tokenizer
from tokenize_stage.pixels.decode import BadImage, Picture, decode_image, load_image, upright_rgb
from tokenize_stage.vq import VQModel, load_vq_model
from tokenize_stage.vq import amused_vq as amused_vq  # these three for train_stage/convert.py
from tokenize_stage.vq import maskgit_jax as maskgit_jax
from tokenize_stage.vq import taming as taming

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
WRAP = 24  # letters of a grid's label in a line
Item = tuple[str, bytes, int]  # name for messages, undecoded bytes, class id


def load_vq(name_or_path: str | Path, device: str | torch.device) -> VQModel:
    """Loads a frozen VQ model from a model directory or the hub onto `device`, for inference."""
    return load_vq_model(name_or_path).to(device).eval().requires_grad_(False)


def check_tokenizer(vq: VQModel, tokenizer: Tokenizer) -> None:
    """Refuses a VQ model other than the one that made the codes."""
    found = model_fingerprint(vq)
    if found != tokenizer.fingerprint:
        raise StoreMismatch(
            f"the codes were made by {tokenizer.name} ({tokenizer.class_name}, fingerprint "
            f"{tokenizer.fingerprint[:12]}…), this VQ model is {found[:12]}…: give vq_model=…"
        )


@torch.inference_mode()
def decode_codes(vq: VQModel, codes: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Codes (B, N) or (B, h, w) in [0, K) -> pictures (B, 3, H, W) uint8: times 255, truncated.

    Raises ValueError for codes outside the codebook (a mask id, or codes of another tokenizer).
    """
    return torch.cat([pixels.mul(255).byte().cpu() for pixels in _decoded(vq, codes, batch_size)])


@torch.inference_mode()
def decode_pixels(vq: VQModel, codes: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """The same as pixels (B, 3, H, W) float32, clipped to [0, 1], not yet in 8 bits."""
    return torch.cat([pixels.cpu() for pixels in _decoded(vq, codes, batch_size)])


def _decoded(vq: VQModel, codes: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Pixels (B, 3, H, W) in [0, 1] on the model's device, batch by batch."""
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= vq.codebook_size:
        raise ValueError(
            f"codes reach from {low} to {high}, but the tokenizer has {vq.codebook_size}: "
            "decode with the tokenizer that made the store"
        )
    device = next(vq.parameters()).device
    for part in codes.split(batch_size):
        yield vq.decode(part.to(device).long()).float().clamp(0, 1)


@torch.inference_mode()
def encode_pictures(vq: VQModel, pictures: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Pictures (B, 3, H, W) uint8 -> codes (B, N) int64, on the CPU."""
    device = next(vq.parameters()).device
    batches = [part.to(device).float().div(255) for part in pictures.split(batch_size)]
    return torch.cat([vq.encode(pixels).cpu() for pixels in batches])  # (B, N)


def fit_picture(picture: Image.Image | str | Path, height: int, width: int) -> torch.Tensor:
    """A picture of any mode, or its file -> (3, height, width) uint8, read as muse-tokenize does.

    Resized until it covers that size, the overhang cropped on both sides. Raises ValueError for
    what is no picture.
    """
    fitted = ImageOps.fit(open_picture(picture), (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def fit_mask(mask: Image.Image | str | Path, height: int, width: int) -> torch.Tensor:
    """A mask, white or transparent where it masks -> (height, width) bool, cut as fit_picture.

    A pixel is masked if any part of what it shows is.
    """
    white = open_picture(mask).convert("L").point(lambda gray: 255 * (gray >= 128))
    return (
        torch.from_numpy(np.array(ImageOps.fit(white, (width, height), Image.Resampling.BOX))) > 0
    )


def open_picture(picture: Image.Image | str | Path) -> Image.Image:
    """A picture or its file as upright RGB, what is transparent over white."""
    try:
        if isinstance(picture, str | Path):
            picture = load_image(Path(picture).read_bytes())
        return upright_rgb(picture)
    except (BadImage, UnidentifiedImageError) as error:
        raise ValueError(f"{picture} is not a picture that can be read: {error}") from None


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """Pictures (N, 3, H, W) uint8 as Pillow's images."""
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]


def save_pictures(pictures: torch.Tensor, folder: Path, names: Sequence[str]) -> None:
    """Writes one PNG for each of `names`, paths within `folder` such as `3/0017.png`."""
    for image, name in zip(to_images(pictures), names, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def save_grid(
    pictures: torch.Tensor, path: Path, columns: int, labels: Sequence[str] | None = None
) -> None:
    """Writes pictures (N, 3, H, W) uint8 as one PNG, row by row, `columns` a row, on white.

    Pictures below 64 pixels are enlarged by whole numbers. labels: one for each row, at its left,
    long ones wrapped, and cut where the row ends.
    """
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    if labels is not None and len(labels) != rows:
        raise ValueError(f"{len(labels)} labels for {rows} rows of {columns} pictures")
    scale, gap = max(1, 64 // width), 2
    height, width = height * scale, width * scale
    size = max(10, height // (5 if all(len(x) <= WRAP for x in labels or []) else 12))
    font, lines = ImageFont.load_default(size=size), max(1, int(height / (size * 1.3)))
    texts = [textwrap.wrap(x, WRAP, max_lines=lines, placeholder=" …") for x in labels or []]
    widths = [int(font.getlength(line)) for text in texts for line in text]
    margin = max(widths) + 12 if widths else 0
    whole = (margin + columns * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = Image.new("RGB", whole, "white")
    for index, image in enumerate(to_images(pictures)):
        row, column = divmod(index, columns)
        image = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(image, (margin + gap + column * (width + gap), gap + row * (height + gap)))
    draw = ImageDraw.Draw(sheet)
    for row, text in enumerate(texts):
        middle = gap + row * (height + gap) + height // 2
        words = "\n".join(text)
        draw.text((margin - 6, middle), words, "black", font, anchor="rm", align="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def read_pictures(
    path: str | Path, resolution: int | None = None, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Reads labelled pictures: (N, 3, R, R) uint8, class ids (N,) int64, class names.

    path: a folder whose sub-folders, sorted, are the classes 0, 1, 2, … (files beside them are
    not looked at); or webdataset tars (a folder of them or `name-{000..009}.tar`), whose classes
    are named by their number. Decoded as muse-tokenize does it, to squares of `resolution`; None:
    of the first picture's shorter side, and all must have its size. limit: at most so many,
    evenly spaced over a folder, the first ones of tars.
    Raises FileNotFoundError for a path with no pictures, ValueError naming a broken one.
    """
    folder = Path(path)
    tars = sorted(map(str, folder.glob("*.tar"))) if folder.is_dir() else str(path)
    if folder.is_dir() and not tars:
        names, items = _folder_items(folder, limit)
    else:
        names, items = [], islice(_tar_items(tars), limit)
    side = resolution
    pictures: list[Picture] = []
    class_ids: list[int] = []
    for name, data, class_id in tqdm(items, desc=f"read {path}", unit=" pictures", disable=None):
        side = side or min(_size(_decode(name, data, 1)))
        pictures.append(_decode(name, data, side))
        class_ids.append(class_id)
        (height, width), first = _size(pictures[-1]), _size(pictures[0])
        if resolution is None and (height, width) != first:
            raise ValueError(
                f"{name} is {width}x{height}, those before it {first[1]}x{first[0]}: "
                "all must have one size"
            )
    if not pictures:
        raise FileNotFoundError(f"{path} holds no pictures in class folders and no webdataset tars")
    names = names or [str(index) for index in range(max(class_ids) + 1)]
    stacked = torch.from_numpy(np.stack([picture.pixels[0] for picture in pictures]))
    return stacked, torch.tensor(class_ids), names


def read_captioned(path: str | Path, resolution: int) -> tuple[torch.Tensor, list[str]]:
    """Pictures (N, 3, R, R) uint8 and captions of webdataset tars (image and txt), or a folder's.

    Raises FileNotFoundError where there are none, ValueError naming a sample that lacks one.
    """
    folder = Path(path)
    tars = sorted(map(str, folder.glob("*.tar"))) if folder.is_dir() else str(path)
    found: list[torch.Tensor] = []
    captions: list[str] = []
    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)  # type: ignore[attr-defined]
    for sample in tqdm(dataset, desc=f"read {path}", unit=" pictures", disable=None):
        name = f"{sample['__url__']}:{sample['__key__']}"
        image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        if image is None or "txt" not in sample:
            raise ValueError(f"{name} has no image or no txt; it has {sorted(sample)}")
        found.append(torch.from_numpy(_decode(name, image, resolution).pixels[0]))
        captions.append(sample["txt"].decode())
    if not found:
        raise FileNotFoundError(f"{path} holds no webdataset tars with captions")
    return torch.stack(found), captions


def _folder_items(folder: Path, limit: int | None) -> tuple[list[str], Iterator[Item]]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    files = [
        (file, class_id)
        for class_id, name in enumerate(names)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES
    ]
    if limit is not None and limit < len(files):
        files = [files[index * len(files) // limit] for index in range(limit)]
    return names, ((str(file), file.read_bytes(), class_id) for file, class_id in files)


def _tar_items(tars: str | list[str]) -> Iterator[Item]:
    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)  # type: ignore[attr-defined]
    for sample in dataset:
        name = f"{sample['__url__']}:{sample['__key__']}"
        image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        if image is None or "cls" not in sample:
            raise ValueError(f"{name} has no image or no cls; it has {sorted(sample)}")
        yield name, image, int(sample["cls"])


def _decode(name: str, data: bytes, resolution: int) -> Picture:
    try:
        return decode_image(data, resolution)
    except BadImage as error:
        raise ValueError(f"{name} is not a picture that can be read: {error}") from None


def _size(picture: Picture) -> tuple[int, int]:
    return picture.original_height, picture.original_width
