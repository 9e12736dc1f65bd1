"""The VQ models of a run, by the column of codes that each makes, and what store.json says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.pretrained import model_fingerprint
from storage.schema import ArrayColumn, StoreMeta, Tokenizer, codes_dtype
from tokenize_stage.config import ModelConfig, SoftCodesConfig, StoreConfig
from tokenize_stage.pipeline.encoder import soft_columns
from tokenize_stage.text.text_columns import TextColumns
from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq.model import VQModel
from tokenize_stage.vq.quantizer import SoftCodes


@dataclass(frozen=True)
class ColumnTokenizer:
    """A VQ model, the resolution at which it sees the images, and what store.json says of it."""

    model: VQModel
    resolution: int
    recorded: Tokenizer  # made when it was loaded: an encoder may change the weights' form
    soft: SoftCodes | None = None  # what is kept beside the codes


def load_tokenizers(config: ModelConfig, resolution: int) -> dict[str, ColumnTokenizer]:
    """Column -> tokenizer, in the order of the configuration.

    resolution: for those that name none. Raises ValueError for one that a model cannot divide,
    and when there is no tokenizer.
    """
    if config.vq_model.pretrained is None and not config.vq_models:
        raise ValueError("model.vq_model.pretrained must be given, or model.vq_models")
    if config.vq_model.pretrained is not None:
        key = "dataset.preprocessing.resolution"
        soft = _soft_codes(config.vq_model)
        return {"codes": _load(config.vq_model.pretrained, resolution, key, soft)}
    return {
        f"codes_{name}": _load(
            one.pretrained,
            one.resolution or resolution,
            f"model.vq_models.{name}.resolution",
            _soft_codes(one),
        )
        for name, one in config.vq_models.items()
    }


def _soft_codes(config: SoftCodesConfig) -> SoftCodes | None:
    return None if config.topk is None else SoftCodes(config.topk, config.topk_temperature)


def _load(pretrained: str, resolution: int, key: str, soft: SoftCodes | None) -> ColumnTokenizer:
    model = load_vq_model(pretrained)
    if soft is not None and soft.topk > model.codebook_size:
        raise ValueError(f"topk={soft.topk}: {pretrained} has {model.codebook_size} codes")
    if resolution % model.reduction:
        raise ValueError(
            f"{key}={resolution} is no multiple of {model.reduction}, "
            "the pixels along a side of one code of this tokenizer"
        )
    recorded = Tokenizer(  # a folder is found from everywhere, a hub name stays one
        name=str(Path(pretrained).resolve()) if Path(pretrained).is_dir() else pretrained,
        class_name=type(model).__name__,
        codebook_size=model.codebook_size,
        grid=list(model.grid(resolution)),
        fingerprint=model_fingerprint(model),
    )
    return ColumnTokenizer(model, resolution, recorded, soft)


def all_resolutions(tokenizers: Mapping[str, ColumnTokenizer]) -> list[int]:
    """Each once; crop boxes are those of the first."""
    return list(dict.fromkeys(one.resolution for one in tokenizers.values()))


def store_meta(
    tokenizers: Mapping[str, ColumnTokenizer],
    transform: Mapping[str, Any],
    text: TextColumns,
    config: StoreConfig,
) -> StoreMeta:
    """What store.json will say; transform: how the pixels are made, and the encoder's dtype."""
    recorded = {column: one.recorded for column, one in tokenizers.items()}
    resolutions = {column: one.resolution for column, one in tokenizers.items()}
    arrays, soft = {}, {}
    for column, one in tokenizers.items():
        dtype, count = codes_dtype(one.recorded.codebook_size), math.prod(one.recorded.grid)
        arrays[column] = ArrayColumn(dtype, [count])
        if one.soft is not None:
            soft[column] = one.soft._asdict()
            for name, kind in zip(soft_columns(column), (dtype, "float16"), strict=True):
                arrays[name] = ArrayColumn(kind, [count, one.soft.topk])
    several = {"resolutions": resolutions} if len(set(resolutions.values())) > 1 else {}
    softs = {"soft_codes": soft} if soft else {}
    texts = {"text": text.record()} if text.arrays else {}
    return StoreMeta(
        resolution=next(iter(resolutions.values())),
        arrays=arrays | text.arrays,
        tokenizers=recorded,
        transform={**transform, **several, **softs, **texts},
        backend=config.backend,
        chunk_rows=config.chunk_rows,
    )
