"""Captions -> the text columns of rows: ids always, pooled vectors and states where asked for.

Beside step 3, for the same rows. NAME is a key of text.tokenizers:

    text_ids_NAME      array (S,), uint16 or uint32: the caption's ids, padded
    text_length_NAME   table, int16: how many of them are no padding
    text_pooled_NAME   array (C,), float16
    text_states_NAME   table, lists of (W,) float16: of the first text_length_NAME positions

A row without a caption gets what "" gets. n rows, u different captions among them.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from storage.schema import ArrayColumn
from storage.text_states import states_type
from tokenize_stage.text.caption_encoder import CaptionEncoder
from tokenize_stage.text.config import TextConfig
from tokenize_stage.text.tokenizer import CaptionTokenizer, load_tokenizer


class TextColumns:
    """Tokenizers and frozen text encoders, held for a run; used by one thread at a time.

    The work is done without Python's lock, so the thread that writes can do it.
    """

    def __init__(self, config: TextConfig, device: str | torch.device = "cpu"):
        """Loads them; without text.tokenizers there are no columns. device: of the encoders.

        Raises ValueError and FileNotFoundError for what cannot be loaded or does not fit.
        """
        self.places = dict(config.tokenizers)
        self.encoders = {
            name: CaptionEncoder(config, name, device)
            for name in self.places
            if name in (*config.pooled, *config.states)
        }
        self.tokenizers: dict[str, CaptionTokenizer] = {}
        for name, place in self.places.items():
            if name in self.encoders:
                encoder = self.encoders[name].encoder
                tokenizer = CaptionTokenizer(encoder.tokenizer, encoder.max_length, name)
                known = encoder.model.config.vocab_size
                if tokenizer.vocabulary_size > known:
                    found = f"a tokenizer of {tokenizer.vocabulary_size} ids, an encoder of {known}"
                    raise ValueError(f"text.tokenizers.{name}={place} holds {found}")
            else:
                tokenizer = CaptionTokenizer(load_tokenizer(place), config.lengths.get(name), name)
            self.tokenizers[name] = tokenizer
        self.rows = 0
        self.cut: Counter[str] = Counter()  # rows whose caption was cut, by name

    @property
    def arrays(self) -> dict[str, ArrayColumn]:
        """The array columns, for StoreMeta.arrays."""
        ids = {
            f"text_ids_{name}": ArrayColumn(tokenizer.dtype, [tokenizer.length])
            for name, tokenizer in self.tokenizers.items()
        }
        pooled = {
            f"text_pooled_{name}": ArrayColumn("float16", [encoder.pooled_width])
            for name, encoder in self.encoders.items()
            if encoder.wants_pooled
        }
        return ids | pooled

    @property
    def fields(self) -> pa.Schema:
        """The table columns, for ShardWriter's extra_columns."""
        lengths = [pa.field(f"text_length_{name}", pa.int16()) for name in self.tokenizers]
        states = [
            pa.field(f"text_states_{name}", states_type(encoder.width))
            for name, encoder in self.encoders.items()
            if encoder.wants_states
        ]
        return pa.schema([*lengths, *states])

    def columns(self, captions: Sequence[str | None]) -> dict[str, Any]:
        """Captions (n,) -> the columns of n rows, as ShardWriter.add takes them.

        What a row gets depends on its caption alone. A caption that several rows have (views of an
        image) is encoded once. Raises ValueError for states that float16 cannot hold.
        """
        texts = [caption or "" for caption in captions]
        number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        rows = np.array([number[text] for text in texts], np.int64)  # (n,) in [0, u)
        columns: dict[str, Any] = {}
        for name, tokenizer in self.tokenizers.items():
            ids, lengths, cut = tokenizer(list(number))
            made = {f"text_ids_{name}": ids, f"text_length_{name}": lengths}
            if name in self.encoders:
                made |= self.encoders[name].columns(ids, lengths)
            for column, values in made.items():
                columns[column] = (
                    values[rows] if isinstance(values, np.ndarray) else values.take(rows)
                )
            self.cut[name] += int(cut[rows].sum())
        self.rows += len(texts)
        return columns

    def record(self) -> dict[str, Any]:
        """What made the columns, for StoreMeta.transform["text"]; {} when there are none.

        tokenizers: NAME -> name (a place, which may differ), class_name, fingerprint,
        vocabulary_size, length, pad_id; encoders: NAME -> class_name, fingerprint, dtype, layer.
        """
        if not self.tokenizers:
            return {}
        tokenizers = {
            name: {"name": self.places[name], **tokenizer.record()}
            for name, tokenizer in self.tokenizers.items()
        }
        encoders = {name: encoder.record() for name, encoder in self.encoders.items()}
        return {"tokenizers": tokenizers, "encoders": encoders}

    def summary(self) -> list[str]:
        """A sentence for each tokenizer: how many captions were too long for it, so far."""
        return [
            f"text_ids_{name}: {self.cut[name]:,} of {self.rows:,} captions cut to "
            f"{tokenizer.length} ids"
            for name, tokenizer in self.tokenizers.items()
        ]
