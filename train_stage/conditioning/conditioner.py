"""Conditioner: rows of the store, or prompts -> the keywords of the model (steps 6 to 8).

Class ids are a token among the codes (objective/masked_batch.py); what is here is text, and the
micro-conditions of a U-ViT. b rows, S text positions, W and C widths of states and pooled vector.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from configs.load import ConfigError
from storage.reader import TokenStore
from tokenize_stage.text.text_encoder import TextStates
from train_stage.conditioning.config import ConditionFields
from train_stage.conditioning.micro_conditions import (
    SCORE,
    SIZES,
    micro_conditions,
    unknown_conditions,
)
from train_stage.conditioning.prompt_encoder import PromptEncoder, combine
from train_stage.conditioning.text_source import TextSource, choose_source
from train_stage.loading.loader import Batch
from train_stage.objective.masked_batch import send

Keywords = dict[str, Tensor]


def make_prompt_encoder(
    config: ConditionFields, store: TokenStore, wants_pooled: bool, device: torch.device
) -> PromptEncoder | None:
    """The text sources that the configuration asks for; None: no text.

    Raises ConfigError for texts that the store does not have.
    """
    kept = None if config.class_prompt is not None else store
    if config.class_prompt is not None and not store.meta.transform.get("class_names"):
        raise ConfigError(
            f"model.class_prompt: {store.path} does not know the names of its classes; "
            "muse-tokenize notes those of class folders, and of dataset.class_index"
        )
    chosen = {name: choose_source(name, c, kept) for name, c in config.text_encoders.items()}
    sources = [TextSource(name, record, wants_pooled, device) for name, record in chosen.items()]
    return PromptEncoder(sources) if sources else None


class Conditioner:
    """Encodes the texts of batches, and drops them; frozen, and the same on all processes."""

    def __init__(
        self,
        encoder: PromptEncoder,
        config: ConditionFields,
        store: TokenStore,
        has_micro_conditions: bool,
        device: torch.device,
    ):
        self.encoder, self.config, self.device = encoder, config, device
        self.resolution = store.meta.resolution
        self.learns_null = config.null_condition == "learned"
        names = store.meta.transform.get("class_names") or []
        self.class_texts = None
        if config.class_prompt is not None:  # the row after the last class is that of no class
            texts = [*(config.class_prompt.format(name) for name in names), ""]
            self.class_texts = encode_all(encoder, texts)
        self.empty = None if self.learns_null else encoder.encode([""])
        micro = (*SIZES, SCORE) if has_micro_conditions else ()
        self.has_micro_conditions = has_micro_conditions
        read = [] if self.class_texts else [c for s in encoder.sources for c in s.columns]
        self.columns: tuple[str, ...] = (*read, *micro)
        self.release_encoders()

    @torch.no_grad()
    def __call__(self, batch: Batch, dropped: Tensor) -> Keywords:
        """The keywords of hidden_states for b rows, on the device; dropped (b,) bool, on the host.

        A dropped row gets all that the empty text has, or is marked for the model's learned text.
        """
        if self.class_texts is not None:
            made = take_rows(self.class_texts, send(batch.class_ids, self.device))
        else:
            parts = [source.encode_rows(batch.columns) for source in self.encoder.sources]
            made = combine(parts, self.encoder.pooling)
        is_dropped = send(dropped, self.device)
        if self.empty is None:
            given = as_keywords(made) | {"dropped": is_dropped}
        else:
            given = as_keywords(replace(made, self.empty, is_dropped))
        if self.has_micro_conditions:
            score = self.config.aesthetic_score
            micro = micro_conditions(batch.columns, self.resolution, score)
            given["micro_conds"] = send(micro, self.device)
        return given

    def for_prompts(self, prompts: Sequence[str]) -> Keywords:
        """The keywords of sampling.generate for prompts (P rows), and for their absence (1 row)."""
        given = as_keywords(self.encoder.encode(prompts))
        if self.has_micro_conditions:
            told = unknown_conditions(self.resolution, self.config.aesthetic_score)
            given["micro_conds"] = told.to(self.device)
        return given | self.absent()

    def absent(self) -> Keywords:
        """What guidance leads away from, as generate names it: the empty text, 1 row.

        Nothing where it is learned: generate then takes the model's.
        """
        if self.empty is None:
            return {}
        names = {
            "encoder_hidden_states": "negative_embeds",
            "encoder_attention_mask": "negative_attention_mask",
            "cond_embeds": "negative_cond_embeds",
        }
        return {names[name]: values for name, values in as_keywords(self.empty).items()}

    def release_encoders(self) -> None:
        """Frees those that rows do not need: states are stored, or texts of classes kept."""
        for source in self.encoder.sources:
            if self.class_texts is not None or source.record.reads_states:
                source.release()

    def record(self) -> dict[str, Any]:
        """What codes.json keeps, so that prompts are encoded alike later."""
        return {
            "text_encoders": {s.name: asdict(s.record) for s in self.encoder.sources},
            "class_prompt": self.config.class_prompt,
            "aesthetic_score": self.config.aesthetic_score,
        }


def encode_all(encoder: PromptEncoder, texts: Sequence[str], batch_size: int = 64) -> TextStates:
    """The states of many texts, which stay on the device."""
    parts = [encoder.encode(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    columns = zip(*parts, strict=True)
    return TextStates(*(None if x[0] is None else torch.cat(x) for x in columns))  # type: ignore[arg-type]


def take_rows(texts: TextStates, rows: Tensor) -> TextStates:
    """Rows (b,) of each tensor; -1 is the last."""
    rows = torch.where(rows < 0, len(texts.states) - 1, rows)
    return TextStates(*(None if x is None else x[rows] for x in texts))  # type: ignore[arg-type]


def replace(made: TextStates, empty: TextStates, dropped: Tensor) -> TextStates:
    """`made` (b rows), with `empty` (1 row) in the rows of dropped (b,) bool."""
    parts = [
        None if x is None else torch.where(dropped.view(-1, *[1] * (x.dim() - 1)), y, x)  # type: ignore[arg-type]
        for x, y in zip(made, empty, strict=True)
    ]
    return TextStates(*parts)  # type: ignore[arg-type]


def as_keywords(made: TextStates) -> Keywords:
    """As the models call them; in float32, as their weights are."""
    named = {
        "encoder_hidden_states": made.states.float(),
        "cond_embeds": None if made.pooled is None else made.pooled.float(),
        "encoder_attention_mask": made.attention_mask,
    }
    return {name: values for name, values in named.items() if values is not None}
