"""Codes of the same images encoded again: as they were, exactly, and in other ways."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokenize_stage.pixels.config import PreprocessingConfig
from tokenize_stage.pixels.decode import Picture
from tokenize_stage.pixels.views import parse_views
from tokenize_stage.quality.examine import mean_psnr, psnr_of_rows
from tokenize_stage.quality.subject import Subject
from tokenize_stage.quality.ways import (
    EXACT,
    Way,
    by_pillow,
    encode_pictures,
    make_pictures,
    way_of,
)

Codes = dict[str, np.ndarray]  # column -> (n, N)


@dataclass
class Found:
    """Images of drawn rows, and the crops that were encoded, by row number in ascending order."""

    images: Mapping[int, bytes]
    pictures: Mapping[int, Picture]
    preprocessing: PreprocessingConfig


def originals(subject: Subject, pictures: Mapping[int, Picture], column: str) -> np.ndarray:
    """The crops as a column's tokenizer saw them: (n, 3, R, R) uint8."""
    place = subject.sizes().index(subject.resolutions[column])
    return np.stack([picture.pixels[place] for picture in pictures.values()])


def encode_again(subject: Subject, found: Found) -> Codes:
    """Codes made as store.json says that the stored ones were."""
    way = Way(found.preprocessing, subject.store.meta.transform.get("dtype", "float32"))
    return _encode(subject, found.pictures, way)


def compare(subject: Subject, found: Found, stored: Codes) -> dict[str, dict[str, Any] | str]:
    """Way -> column -> share of codes that it changes against the exact way, and what that does.

    "psnr": between its reconstructions and the exact ones; "psnr_image": between them and the crop.
    Beside subject.config.compare there are "exact" and "stored", the codes of the store. A way that
    this machine cannot go, or whose dtype the encoder leaves, has the reason instead.
    """
    crops = _crops(subject, found, EXACT)
    reference = _encode(subject, crops, EXACT)
    rebuilt = {column: subject.rebuilt(column, codes) for column, codes in reference.items()}
    results: dict[str, dict[str, Any] | str] = {}
    for name in ("exact", "stored", *subject.config.compare):
        try:
            made = {"exact": reference, "stored": stored}.get(name)
            if made is None:
                way = way_of(name, found.preprocessing)
                made = _encode(subject, _crops(subject, found, way), way)
            results[name] = {
                column: _against(
                    reference[column],
                    rebuilt[column],
                    codes,
                    subject.rebuilt(column, codes),
                    originals(subject, crops, column),
                )
                for column, codes in made.items()
            }
        except (ValueError, RuntimeError) as error:
            results[name] = str(error).splitlines()[0]
    return results


def _crops(subject: Subject, found: Found, way: Way) -> Mapping[int, Picture]:
    """The crops as a way makes them. Raises ValueError where it cannot."""
    if way.preprocessing == found.preprocessing:
        return found.pictures
    if way.preprocessing is None:
        views = parse_views(found.preprocessing.views)
        return {
            number: by_pillow(found.images[number], picture, views[picture.view], subject.sizes())
            for number, picture in found.pictures.items()
        }
    if way.preprocessing.decode_device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here")
    rows = [row for row in subject.rows if row.number in found.pictures]
    pictures, problems, _ = make_pictures(rows, found.images, way.preprocessing, subject.sizes())
    if problems:
        raise ValueError(problems[0])
    return pictures


def _encode(subject: Subject, pictures: Mapping[int, Picture], way: Way) -> Codes:
    return encode_pictures(
        list(pictures.values()),
        subject.places,
        subject.resolutions,
        way,
        subject.device,
        subject.config.batch_size,
    )


def _against(
    exact: np.ndarray,
    exact_rebuilt: np.ndarray,
    codes: np.ndarray,
    rebuilt: np.ndarray,
    crops: np.ndarray,
) -> dict[str, float | None]:
    return {
        "changed": float((codes != exact).mean()),
        "psnr": mean_psnr(psnr_of_rows(exact_rebuilt, rebuilt)),
        "psnr_image": mean_psnr(psnr_of_rows(crops, rebuilt)),
    }
