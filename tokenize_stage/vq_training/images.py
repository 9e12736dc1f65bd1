"""The images a VQ model is trained on: read once into memory, then served by step number.

Which images a step takes is a pure function of (seed, step), so a resumed run needs no state.
B batch, R resolution, n training images.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

import numpy as np
import torch
from tqdm import tqdm

from tokenize_stage.pixels.decode import BadImage, decode_image
from tokenize_stage.sources.config import DatasetConfig
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.sources.read import read_samples
from tokenize_stage.sources.sample import Sample, Skipped

# First words of the numpy seeds, so that the draws of one seed do not resemble one another.
SPLIT, ORDER, FLIP, DROPOUT, CLUSTER, REVIVE = range(6)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """train, held_out: (n, 3, R, R) uint8. left_out: reason -> number of samples without image."""

    train: np.ndarray
    held_out: np.ndarray
    left_out: Counter[str]
    fingerprint: str


def load_images(
    path: str, resolution: int, max_images: int, held_out_images: int, seed: int
) -> ImageSet:
    """Reads up to `max_images` images and sets a random part of them aside as held-out.

    Raises FileNotFoundError for a path without images, ValueError where none is left to train on.
    """
    left_out: Counter[str] = Counter()
    pictures = []
    with tqdm(desc="reading images", unit=" images", total=max_images) as bar:
        for picture in _decode(_samples(path), resolution):
            if isinstance(picture, str):
                left_out[picture] += 1
                continue
            pictures.append(picture)
            bar.update()
            if len(pictures) == max_images:
                break
        bar.total = len(pictures)
        bar.refresh()
    if len(pictures) <= held_out_images:
        raise ValueError(
            f"{path} gave {len(pictures)} images (left out: {dict(left_out)}), of which "
            f"dataset.held_out_images={held_out_images} are not trained on; lower it or add images"
        )
    images = np.stack(pictures)  # (n, 3, R, R)
    digest = hashlib.sha256(images.data).hexdigest()
    order = np.random.default_rng((SPLIT, seed)).permutation(len(images))
    held_out, train = np.sort(order[:held_out_images]), np.sort(order[held_out_images:])
    return ImageSet(images[train], images[held_out], left_out, digest)


def _samples(path: str) -> Iterator[Sample | Skipped]:
    shards = list_input_shards(DatasetConfig(path))
    return chain.from_iterable(read_samples(shard) for shard in shards)


def _decode(samples: Iterator[Sample | Skipped], resolution: int) -> Iterator[np.ndarray | str]:
    """Yields the pixels (3, R, R) uint8 of each sample, or the kind of reason why it has none."""

    def pixels_or_reason(sample: Sample | Skipped) -> np.ndarray | str:
        if isinstance(sample, Skipped):
            return sample.reason.partition(":")[0]
        try:
            return decode_image(sample.data, resolution).pixels[0]
        except BadImage as error:
            return f"bad image: {str(error).partition(':')[0]}"

    with ThreadPoolExecutor() as pool:
        while window := list(islice(samples, 512)):
            yield from pool.map(pixels_or_reason, window)


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((ORDER, seed, epoch)).permutation(count)


def batch_rows(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """Rows of the training images of one step (B,): epochs follow one another without a gap."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(places, count)
    parts = [_epoch_order(count, seed, int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(parts)


def random_flip(images: np.ndarray, step: int, seed: int) -> np.ndarray:
    """Mirrors half of the images (B, 3, R, R), drawn anew for every step."""
    is_flipped = np.random.default_rng((FLIP, seed, step)).random(len(images)) < 0.5
    return np.where(is_flipped[:, None, None, None], images[..., ::-1], images)


def to_pixels(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """(B, 3, R, R) uint8 -> float32 pixels in [0, 1] on the device."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).float() / 255
