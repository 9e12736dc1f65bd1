"""Prompts -> what guides a model, by one text encoder or several together (steps 7 and 8).

The states of several follow one another, narrower ones filled with zeros up to the widest; the
pooled vector is that of the first that projects one (Esser et al. 2024), else of the first.
P prompts, S positions of all encoders, W width of the widest, C width of the pooled vector.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenize_stage.text.text_encoder import TextStates
from train_stage.conditioning.text_source import SourceRecord, TextSource


class PromptEncoder:
    """The text sources of a model; MusePipeline takes it in place of a TextEncoder."""

    def __init__(self, sources: Sequence[TextSource]):
        self.sources = list(sources)

    @classmethod
    def from_records(cls, records: dict[str, dict[str, Any]], wants_pooled: bool) -> Self:
        """From what codes.json keeps: NAME -> the fields of a SourceRecord."""
        made = {name: SourceRecord(**record) for name, record in records.items()}
        device = torch.device("cpu")
        return cls([TextSource(name, r, wants_pooled, device) for name, r in made.items()])

    @property
    def widths(self) -> tuple[int, int]:
        """W and C."""
        states = max(source.widths[0] for source in self.sources)
        return states, self.sources[self.pooling].widths[1]

    @property
    def pooling(self) -> int:
        """Which source gives the pooled vector: the first that projects one, else the first."""
        found = (number for number, source in enumerate(self.sources) if source.projects)
        return next(found, 0) if len(self.sources) > 1 else 0

    @property
    def length(self) -> int:
        """S."""
        return sum(source.length for source in self.sources)

    @property
    def max_length(self) -> int:
        """Tokens of a prompt that every encoder reads."""
        return min(source.encoder.max_length for source in self.sources)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], pooled: bool | None = None, clip_skip: int | None = None
    ) -> TextStates:
        """States (P, S, W), pooled (P, C) where the model reads it, mask (P, S) if one is needed.

        pooled is what the model was built for. Raises ValueError for clip_skip, which is not.
        """
        if clip_skip is not None:
            raise ValueError(
                f"clip_skip={clip_skip}: this model's texts are encoded as in its training"
            )
        return combine([source.encode_prompts(prompts) for source in self.sources], self.pooling)

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that some encoder does not read to their end."""
        cut = {text for source in self.sources for text in source.encoder.cut_prompts(prompts)}
        return [prompt for prompt in prompts if prompt in cut]

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Moves the encoders; each keeps the dtype that it was trained beside."""
        for source in self.sources:
            source.device = torch.device(device)
            source.encoder.to(device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Refuses: a pipeline's folder has room for one CLIP or T5, not for this."""
        raise ValueError(
            f"{folder}: the text encoders of this model are named in its codes.json; copy the "
            "model directory, which muse-generate and MusePipeline.from_pretrained open as it is"
        )


def combine(parts: Sequence[TextStates], pooling: int = 0) -> TextStates:
    """Several encoders' states of the same texts as one sequence, with the pooled vector of one.

    In the widest of their dtypes. See the module.
    """
    if len(parts) == 1:
        return parts[0]
    width = max(part.states.shape[-1] for part in parts)
    states = [F.pad(part.states, (0, width - part.states.shape[-1])) for part in parts]
    mask = None
    if any(part.attention_mask is not None for part in parts):
        mask = torch.cat([_mask_of(part) for part in parts], 1)
    return TextStates(torch.cat(states, 1), parts[pooling].pooled, mask)


def _mask_of(part: TextStates) -> Tensor:
    if part.attention_mask is not None:
        return part.attention_mask
    return torch.ones(part.states.shape[:2], dtype=torch.bool, device=part.states.device)
