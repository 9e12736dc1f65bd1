"""One text encoder beside one store's columns: rows or prompts -> text states.

A store keeps ids, on which the frozen encoder runs in every step, or what it made of them; prompts
go through the same encoder. b rows, S positions, W width of a state, C of a pooled vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from configs.load import ConfigError
from storage.pretrained import weights_fingerprint
from storage.reader import TokenStore
from tokenize_stage.text.text_encoder import TextEncoder, TextStates, read_widths
from train_stage.conditioning.config import TextEncoderConfig
from train_stage.objective.masked_batch import send

BEFORE_LAST = "before the last"  # the layer of stored states, as store.json says it


@dataclass
class SourceRecord:
    """What it takes to encode alike, later and elsewhere; codes.json keeps it."""

    pretrained: str
    tokenizer: dict[str, Any] | None = None  # store.json's of the ids; None: prompts only
    encoder: dict[str, Any] | None = None  # store.json's of stored states
    reads_states: bool = False
    hide_padding: bool | None = None
    dtype: str = "float32"


def choose_source(name: str, config: TextEncoderConfig, store: TokenStore | None) -> SourceRecord:
    """How the texts of a store are read; store None: there are prompts only.

    Raises ConfigError for columns that the store does not have.
    """
    text = {} if store is None else store.meta.transform.get("text") or {}
    tokenizers, key = text.get("tokenizers") or {}, f"model.text_encoders.{name}"
    if store is not None and name not in tokenizers:
        raise ConfigError(
            f"{key}: the store has no text_ids_{name}, but {', '.join(tokenizers) or 'no texts'}. "
            f"muse-tokenize with text.tokenizers.{name}=… makes them; the names of classes are "
            "text by model.class_prompt"
        )
    has_states = store is not None and f"text_states_{name}" in store.columns
    if config.source == "states" and not has_states:
        raise ConfigError(
            f"{key}.source=states: the store has no text_states_{name}; take ids, or make them "
            f"by muse-tokenize with text.states=[{name}]"
        )
    reads_states = has_states and config.source != "ids"
    if reads_states and config.hide_padding is False:
        raise ConfigError(
            f"{key}.hide_padding=false: states of padding are not stored; take source=ids"
        )
    tokenizer = tokenizers.get(name)
    place = config.pretrained or (tokenizer or {}).get("name")
    if place is None:
        raise ConfigError(f"{key}.pretrained is missing: which text encoder?")
    encoder = (text.get("encoders") or {}).get(name)
    return SourceRecord(place, tokenizer, encoder, reads_states, config.hide_padding, config.dtype)


class TextSource:
    """See the module. wants_pooled: the model reads a pooled vector, too."""

    def __init__(self, name: str, record: SourceRecord, wants_pooled: bool, device: torch.device):
        self.name, self.record, self.wants_pooled = name, record, wants_pooled
        self.device, self.dtype = device, getattr(torch, record.dtype)

    @property
    def columns(self) -> tuple[str, ...]:
        """What a batch is to hold."""
        if not self.record.reads_states:
            return (f"text_ids_{self.name}", f"text_length_{self.name}")
        pooled = (f"text_pooled_{self.name}",) if self.wants_pooled and self.projects else ()
        return (f"text_states_{self.name}", f"text_length_{self.name}", *pooled)

    @property
    def widths(self) -> tuple[int, int]:
        """W and C; where no pooled vector is projected, it is a mean of states."""
        states, projected = self._own_widths
        return states, projected if self.projects and projected else states

    @property
    def projects(self) -> bool:
        """Whether states are those before the last layer, and a projected vector is beside them.

        As the stored states were made, else where a pooled vector is read.
        """
        if self.record.reads_states and self.record.encoder is not None:
            return self.record.encoder["layer"] == BEFORE_LAST
        return self.wants_pooled and self._own_widths[1] is not None

    @property
    def length(self) -> int:
        """S."""
        tokenizer = self.record.tokenizer
        return self.encoder.max_length if tokenizer is None else tokenizer["length"]

    @cached_property
    def encoder(self) -> TextEncoder:
        """Loaded when it is first needed; what made stored states, in the same dtype.

        Raises ValueError if it is not the one of the ids, or of the states.
        """
        record = self.record
        stored = record.encoder if record.reads_states else None
        dtype = self.dtype if stored is None else getattr(torch, stored["dtype"])
        length = None if record.tokenizer is None else record.tokenizer["length"]
        encoder = TextEncoder.from_pretrained(record.pretrained, dtype=dtype, length=length)
        if record.tokenizer is not None:
            encoder.check_tokenizer(record.tokenizer)
        if stored is not None and weights_fingerprint(encoder.model) != stored["fingerprint"]:
            raise ValueError(
                f"model.text_encoders.{self.name}: {record.pretrained} is not what made the stored "
                "states: its weights, or their names in another version of transformers, differ; "
                "open the text encoder that did, or train with source=ids"
            )
        return encoder.to(self.device)

    def release(self) -> None:
        """Frees the encoder's memory; where it is needed again, it is loaded again."""
        self.__dict__.pop("encoder", None)

    def encode_rows(self, columns: Mapping[str, Tensor]) -> TextStates:
        """Columns of b rows, on the host -> their states, on the device."""
        moved = {name: send(columns[name], self.device) for name in self.columns}
        lengths = moved[f"text_length_{self.name}"].long()
        if not self.record.reads_states:
            return self._finish(self._run(moved[f"text_ids_{self.name}"].long(), lengths), lengths)
        pooled = moved.get(f"text_pooled_{self.name}")
        states = moved[f"text_states_{self.name}"].to(self.dtype)
        return self._finish(
            TextStates(states, None if pooled is None else pooled.to(self.dtype)), lengths
        )

    def encode_prompts(self, prompts: Sequence[str]) -> TextStates:
        """The same for words; those that are too long are cut."""
        tokens = self.encoder.tokenizer(
            list(prompts),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.encoder.max_length,
            return_attention_mask=True,
        ).to(self.device)
        lengths = tokens.attention_mask.sum(-1)
        return self._finish(self._run(tokens.input_ids, lengths), lengths)

    @cached_property
    def _own_widths(self) -> tuple[int, int | None]:
        try:
            return read_widths(self.record.pretrained)
        except FileNotFoundError as error:
            key = f"model.text_encoders.{self.name}"
            raise FileNotFoundError(
                f"{key}: {error} Give its folder by {key}.pretrained=…; stored states need it, "
                "too, for the empty text and for prompts"
            ) from None

    @property
    def _hides_padding(self) -> bool:
        if self.record.reads_states or self.record.hide_padding is not None:
            return self.record.reads_states or bool(self.record.hide_padding)
        return not type(self.encoder.model).__name__.startswith("CLIP")  # shown, as published

    def _run(self, ids: Tensor, lengths: Tensor) -> TextStates:
        return self.encoder.encode_ids(ids, self.projects, lengths=lengths)

    def _finish(self, made: TextStates, lengths: Tensor) -> TextStates:
        """With the pooled vector where it is read, and a mask where padding is hidden."""
        own = torch.arange(made.states.shape[1], device=self.device) < lengths[:, None]  # (b, S)
        pooled = made.pooled
        if pooled is None:
            pooled = (made.states.float() * own.unsqueeze(-1)).sum(1)
            pooled = pooled / lengths[:, None].clamp(min=1)
        mask = own if self._hides_padding else None
        return TextStates(made.states, pooled if self.wants_pooled else None, mask)
