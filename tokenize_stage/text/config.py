"""Options of text in the store (text.*); each field's sentence is its --help."""

import re
from dataclasses import dataclass, field
from typing import Literal

MAX_LENGTH = 2**15 - 1  # text_length_<name> is an int16 column


@dataclass
class TextConfig:
    tokenizers: dict[str, str] = field(default_factory=dict)
    """Columns text_ids_NAME of the captions' ids: {clip: FOLDER, t5: FOLDER}, each a tokenizer or a
    text encoder with one, in a folder or on the Hugging Face hub. None: captions stay words."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Ids of a row, {t5: 128}, longer captions being cut; else as many as the tokenizer takes (77
    for CLIP). A T5 must be given the same number of padded ids ever after: it sees the padding."""
    pooled: list[str] = field(default_factory=list)
    """Names whose text encoder's pooled vectors are stored, too: [clip]."""
    states: list[str] = field(default_factory=list)
    """Names whose states of every token are stored: [clip]. They are most of a store's bytes."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the text encoders; what they give is stored as float16."""
    batch_size: int = 64
    """Captions encoded at once."""

    def __post_init__(self) -> None:
        for name in self.tokenizers:
            if not re.fullmatch("[a-z0-9_]+", name):
                raise ValueError(f"text.tokenizers.{name}: a name has a-z, 0-9 and _ only")
        for key in ("lengths", "pooled", "states"):
            names = getattr(self, key)
            for name in names:
                if name not in self.tokenizers or list(names).count(name) > 1:
                    legal = ", ".join(self.tokenizers) or "none: give text.tokenizers"
                    raise ValueError(f"text.{key}={names}: legal names, each once, are {legal}")
        for name, length in self.lengths.items():
            if not 2 <= length <= MAX_LENGTH:
                raise ValueError(f"text.lengths.{name}={length}: it must be in 2..{MAX_LENGTH}")
        if self.batch_size < 1:
            raise ValueError(f"text.batch_size={self.batch_size}: it must be at least 1")
