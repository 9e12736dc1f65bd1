"""What becomes of one sample before it is encoded: its rows, or the reason why there are none."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pyarrow as pa

from tokenize_stage.pixels.decode import BadImage, Picture
from tokenize_stage.pixels.views import Decoder
from tokenize_stage.selection.filters import Selection
from tokenize_stage.sources.sample import InputShard, Sample, Skipped

FIELDS = pa.schema([("flipped", pa.bool_()), ("image_hash", pa.string())])
"""Columns of the table that every row has, beside those of every store and of the selection."""


@dataclass(frozen=True, eq=False)
class Row:
    """One view of a sample (without its bytes and metadata); columns: those of the selection."""

    sample: Sample
    image_hash: str
    picture: Picture
    columns: dict[str, Any]


Outcome = list[Row] | Skipped
Prepare = Callable[[Sample], Outcome]


def preparation(decoder: Decoder, selection: Selection) -> Callable[[InputShard], Prepare]:
    """A function that gives a shard's own function from a sample to its rows; for many threads."""

    def of_shard(shard: InputShard) -> Prepare:
        of_this = selection.for_shard(shard.name)

        def prepare(sample: Sample) -> Outcome:
            image_hash = sha256(sample.data).hexdigest()
            reason = of_this.check(sample, image_hash)
            if reason:
                return Skipped(sample.key, sample.source, reason)
            try:
                pictures = decoder.decode(sample.data, image_hash)
            except BadImage as error:
                return Skipped(sample.key, sample.source, f"bad image: {error}")
            if reason := of_this.check_picture(sample, pictures[0]):
                return Skipped(sample.key, sample.source, reason)
            columns = of_this.columns(sample, image_hash, pictures[0])
            caption = selection.caption(sample.caption)
            kept = dataclasses.replace(sample, data=b"", metadata={}, caption=caption)
            return [Row(kept, image_hash, picture, columns) for picture in pictures]

        return prepare

    return of_shard
