"""What the frozen text encoders cost that run beside a model: counted from their configurations.

Part of `muse-train --dry-run`: no weights are read. S text positions.
"""

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenize_stage.text.text_encoder import ENCODERS
from train_stage.conditioning.prompt_encoder import PromptEncoder
from train_stage.conditioning.text_source import TextSource
from train_stage.models.sizes import count_parameters


class TextCost(NamedTuple):
    """Of one encoder."""

    name: str
    parameters: int
    weights: int  # bytes
    flops: int  # of a row's text; 0 where states are stored, or texts are encoded but once
    dtype: str


def count_texts(encoder: PromptEncoder | None, runs: bool) -> list[TextCost]:
    """The cost of every text encoder of a run; runs: whether rows' texts are encoded in it."""
    return [] if encoder is None else [count_text(source, runs) for source in encoder.sources]


@torch.no_grad()
def count_text(source: TextSource, runs: bool) -> TextCost:
    """What one encoder costs; it is there in any case, for the empty text and for prompts."""
    record = source.record
    model = encoder_shape(record.pretrained)
    flops, parameters = 0, count_parameters(model)
    if runs and not record.reads_states:
        ids = torch.zeros(1, source.length, dtype=torch.long, device="meta")  # (1, S)
        with FlopCounterMode(display=False) as counter:
            model(ids)
        flops = counter.get_total_flops()
    size = getattr(torch, record.dtype).itemsize
    return TextCost(source.name, parameters, size * parameters, flops, record.dtype)


def encoder_shape(pretrained: str) -> Any:
    """A text encoder of transformers without data, as TextEncoder would open it."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(pretrained)
    kinds = [ENCODERS[name] for name in config.architectures or [] if name in ENCODERS]
    with torch.device("meta"):
        if not kinds:
            return transformers.AutoModel.from_config(config)
        return getattr(transformers, kinds[0])(getattr(config, "text_config", config))
