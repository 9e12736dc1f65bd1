"""Captions -> ids of one length, by a tokenizer of `transformers`: the columns text_ids_NAME.

The ids are those of TextEncoder.encode for the same words, made by the same Rust code without
holding Python's lock meanwhile. n captions, S ids of each.
"""

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from storage.fingerprint import fingerprint
from storage.schema import codes_dtype
from tokenize_stage.text.config import MAX_LENGTH

READ_CHARS = 2**16  # of a caption; whoever writes a novel is not read to the end
PROBES = [  # beside every word of the vocabulary: what the words alone would not show
    "",
    "A photo of  a CAT,\tthe cat's\n12345 cats!",
    "Ünï Ʉ ﬁ é e\u0301 \u00a0— 猫 кот 😀",
    " <|startoftext|><|endoftext|></s><pad> &amp; <b>",
]


class TextIds(NamedTuple):
    """What a tokenizer makes of captions."""

    ids: np.ndarray  # (n, S) uint16, or uint32 where the vocabulary needs it
    lengths: np.ndarray  # (n,) int16: how many of them are no padding
    cut: np.ndarray  # (n,) bool: whether the caption was longer


def import_transformers() -> Any:
    """The optional dependency. Raises ValueError that says how to install it."""
    try:
        import transformers
    except ImportError:
        raise ValueError("text needs transformers: pip install 'open-muse[text]'") from None
    return transformers


def load_tokenizer(
    name_or_path: str | Path, subfolder: str = "", revision: str | None = None
) -> Any:
    """A tokenizer of transformers from a folder or the hub. Raises FileNotFoundError without."""
    transformers = import_transformers()
    if Path(name_or_path).is_dir():
        name_or_path, subfolder = Path(name_or_path, subfolder), ""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            name_or_path, subfolder=subfolder, revision=revision
        )
    except (OSError, ValueError) as error:
        place = Path(name_or_path, subfolder)
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{place} holds no tokenizer: {reason}") from None


class CaptionTokenizer:
    """A tokenizer set to cut at, and pad to, one length; of its own, so that no other use of the
    tokenizer changes it."""

    def __init__(self, tokenizer: Any, length: int | None, name: str):
        """length: S; None: what the tokenizer says. name: of it, for errors.

        Raises ValueError for a tokenizer that does not say, pads on the left or is none of Rust.
        """
        if length is None and tokenizer.model_max_length > MAX_LENGTH:
            raise ValueError(
                f"text.tokenizers.{name} does not say how many ids its encoder takes: give "
                f"text.lengths.{name} (77 for CLIP, 128 to 512 for T5)"
            )
        if not hasattr(tokenizer, "backend_tokenizer") or tokenizer.padding_side != "right":
            raise ValueError(
                f"text.tokenizers.{name} is a {type(tokenizer).__name__} that pads on the "
                f"{tokenizer.padding_side}: one with a tokenizer.json, padding right, is wanted"
            )
        if tokenizer.pad_token_id is None:
            raise ValueError(f"text.tokenizers.{name} has no padding token")
        self.length = int(tokenizer.model_max_length if length is None else length)
        self.pad_id = int(tokenizer.pad_token_id)
        self.rust = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self.rust.no_truncation()
        self.rust.no_padding()
        self.class_name = type(tokenizer).__name__
        self.fingerprint = tokenizer_fingerprint(self.rust)
        self.vocabulary_size = max(self.rust.get_vocab().values()) + 1
        self.dtype = codes_dtype(self.vocabulary_size)
        self.rust.enable_truncation(self.length)

    def __call__(self, captions: Sequence[str]) -> TextIds:
        """Captions -> ids padded to S, cut where longer, with the end token kept."""
        made = self.rust.encode_batch_fast([caption[:READ_CHARS] for caption in captions])
        found = [encoding.ids for encoding in made]
        lengths = np.fromiter(map(len, found), np.int16, len(found))
        ids = np.full((len(found), self.length), self.pad_id, self.dtype)
        ids[np.arange(self.length) < lengths[:, None]] = np.fromiter(
            chain.from_iterable(found), self.dtype, int(lengths.sum())
        )
        cut = [
            bool(encoding.overflowing) or len(caption) > READ_CHARS
            for encoding, caption in zip(made, captions, strict=True)
        ]
        return TextIds(ids, lengths, np.array(cut, bool))

    def record(self) -> dict[str, Any]:
        """What the store says of it, so that training can check its text encoder."""
        return {
            "class_name": self.class_name,
            "fingerprint": self.fingerprint,
            "vocabulary_size": self.vocabulary_size,
            "length": self.length,
            "pad_id": self.pad_id,
        }


def tokenizer_fingerprint(rust: Any) -> str:
    """sha256 of what a tokenizer does: its vocabulary, and the ids of every word of it and PROBES.

    So it is the same in every file format that gives the same ids. Neither cuts nor pads now.
    """
    vocabulary = rust.get_vocab()
    digest = hashlib.sha256(fingerprint(vocabulary).encode())
    for made in rust.encode_batch_fast([*sorted(vocabulary), *PROBES]):
        digest.update(np.array([len(made.ids), *made.ids], "<u4").tobytes())
    return digest.hexdigest()
