"""The stages that samples go through on their way into the store, as a configuration has them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from threading import Event

import pyarrow as pa
import torch

from tokenize_stage.config import TokenizeConfig
from tokenize_stage.pipeline.decode_ahead import Read
from tokenize_stage.pipeline.encoder import Encoder
from tokenize_stage.pipeline.rows import FIELDS
from tokenize_stage.pipeline.tokenizers import ColumnTokenizer, all_resolutions
from tokenize_stage.pixels.views import Decoder
from tokenize_stage.selection.filters import Selection
from tokenize_stage.sources.read import read_patience, read_samples
from tokenize_stage.text.text_columns import TextColumns

BATCH_SIZES = {"cuda": 128, "cpu": 8}
DTYPES = {"cuda": "float16", "cpu": "float32"}


@dataclass
class Stages:
    """read a shard, select and decode its samples, encode rows and captions."""

    read: Read
    selection: Selection
    decoder: Decoder
    encoder: Encoder
    text: TextColumns
    resolutions: list[int]
    views: int
    batch_size: int
    threads: int

    @property
    def fields(self) -> pa.Schema:
        """Columns of the table beside those of every store."""
        return pa.unify_schemas([FIELDS, self.selection.fields, self.text.fields])


def encoder_dtype(config: TokenizeConfig, device: torch.device) -> str:
    """encode.dtype, auto resolved: float16 on a GPU, float32 on a CPU."""
    return DTYPES[device.type] if config.encode.dtype == "auto" else config.encode.dtype


def _gpu(encoding: torch.device) -> str:
    """The GPU that decodes, where one is to: the one that encodes, if any."""
    return str(encoding) if encoding.type == "cuda" else "cuda"


def build_stages(
    config: TokenizeConfig,
    tokenizers: Mapping[str, ColumnTokenizer],
    device: torch.device,
    stop: Event,
) -> Stages:
    """Loads what the stages need; reading ends when `stop` is set.

    Raises ValueError or OSError, naming the option, for what cannot be used.
    """
    preprocessing, resolutions = config.dataset.preprocessing, all_resolutions(tokenizers)
    batch_size = config.encode.batch_size or BATCH_SIZES[device.type]
    return Stages(
        read=partial(read_samples, patience=read_patience(config.dataset), stop=stop),
        selection=Selection(config.filters),
        decoder=Decoder(preprocessing, resolutions, config.filters.phash, _gpu(device)),
        encoder=Encoder(
            {column: one.model for column, one in tokenizers.items()},
            {column: one.resolution for column, one in tokenizers.items()},
            device,
            getattr(torch, encoder_dtype(config, device)),
            batch_size,
            config.encode.compile,
            soft={column: one.soft for column, one in tokenizers.items() if one.soft},
        ),
        text=TextColumns(config.text, device),
        resolutions=resolutions,
        views=len(preprocessing.views),
        batch_size=batch_size,
        threads=config.encode.decode_threads or len(os.sched_getaffinity(0)),
    )
