"""The part of model.* that says what guides the model (steps 6 to 8)."""

import re
from dataclasses import dataclass, field
from typing import Literal

from configs.load import ConfigError


@dataclass
class TextEncoderConfig:
    pretrained: str | None = None
    """A text encoder of transformers (CLIP, T5, BERT, …): folder or hub name. Null: the one that
    the store's ids were made for."""
    source: Literal["auto", "ids", "states"] = "auto"
    """ids: it runs on the store's text_ids in every step; states: the store's text_states are read;
    auto: states, where the store has them."""
    hide_padding: bool | None = None
    """Whether the model is kept from the states of padding. Null: as published, not with CLIP's
    ids; with all else. States of padding are not stored, so with stored ones it always is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What it computes in. Of stored states: as the store says, so that prompts fit them."""


@dataclass
class ConditionFields:
    """The part of model.* that says what guides the model. Without text, the class id does."""

    text_encoders: dict[str, TextEncoderConfig] = field(default_factory=dict)
    """NAME: text_ids_NAME or text_states_NAME of the store, where rows without a caption have the
    empty text. Of several, the states follow one another, narrower ones filled with zeros (Esser
    et al. 2024); a U-ViT's pooled vector is of the first that projects one, as CLIP does."""
    class_prompt: str | None = None
    """The names of classes as text, as in "a photo of a {}"; instead of captions."""
    null_condition: Literal["empty", "learned"] = "empty"
    """What a dropped text becomes: the encoded empty text, or vectors that are learned."""
    aesthetic_score: float = 6.0
    """Told to a U-ViT for rows whose score is not known, and for prompts. (Rows whose sizes are not
    known count as pictures of the store's resolution, not cropped.)"""

    def __post_init__(self) -> None:
        if self.class_prompt is not None and not re.fullmatch(
            r"[^{}]*\{\}[^{}]*", self.class_prompt
        ):
            raise ConfigError(
                f"model.class_prompt={self.class_prompt}: write {{}} where the class's name "
                "belongs, once, and no other braces"
            )
        if self.class_prompt is not None and not self.text_encoders:
            raise ConfigError("model.class_prompt is text: give model.text_encoders, too")
        if self.null_condition == "learned" and not self.text_encoders:
            raise ConfigError("model.null_condition=learned is for text: give model.text_encoders")
