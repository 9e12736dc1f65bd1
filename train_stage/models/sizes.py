"""Sizes of the transformers: presets, and parameters and operations a token, counted (step 7).

    python -m train_stage.models.sizes      prints the tables of the README

Widths, layers and heads (64 wide) are ViT's (Dosovitskiy et al. 2021, Touvron et al. 2021); the
gated feed-forward is 8/3 of the width: its three matrices hold what two of four widths do.
"""

import sys
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from train_stage.models.token_transformer import TokenTransformer
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT

MODELS: dict[str, type[TokenTransformer]] = {
    "transformer": MaskGitTransformer,
    "uvit": MaskGiTUViT,
}
TEXT_LENGTH = 77  # tokens of CLIP's texts
CODES = 256  # of a row, in the tables
CLASS_CONDITIONAL = {"num_classes": 1000, "codebook_size": 1024, "num_vq_tokens": CODES}


def _trunk(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }


def _stem(channels: int, heads: int) -> dict[str, Any]:
    return {
        "block_out_channels": (channels,),
        "in_channels": channels,
        "block_num_heads": heads,
    }


SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "transformer": {
        "tiny": _trunk(192, 12, 3, 512),
        "small": _trunk(384, 12, 6, 1024),
        "base": _trunk(768, 12, 12, 2048),
        "large": _trunk(1024, 24, 16, 2816),
        "xl": _trunk(1280, 32, 20, 3456),
    },
    "uvit": {
        "tiny": _trunk(192, 12, 3, 512) | _stem(192, 3),
        "small": _trunk(384, 12, 6, 1024) | _stem(384, 6),
        "base": _trunk(768, 12, 12, 2048) | _stem(576, 9),
        "large": _trunk(1024, 22, 16, 2816) | _stem(768, 12),  # muse-256, muse-512, aMUSEd
        "xl": _trunk(1280, 32, 20, 3456) | _stem(960, 15),
    },
}

# what `scale=tiny` of muse-train makes of any model
SCALED_DOWN: dict[str, dict[str, Any]] = {
    "transformer": _trunk(32, 2, 2, 64),
    "uvit": _trunk(32, 2, 2, 64)
    | {"in_channels": 16, "block_out_channels": [16], "block_num_heads": 2, "num_res_blocks": 1}
    | {"micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40},
}


def size_fields(name: str, architecture: str = "transformer") -> dict[str, Any]:
    """The keywords of a model that a preset sets. Raises ValueError for one that there is not."""
    if architecture not in SIZES:
        raise ValueError(f"architecture {architecture!r}: legal are {', '.join(SIZES)}")
    if name not in SIZES[architecture]:
        raise ValueError(f"size {name!r}: legal are {', '.join(SIZES[architecture])}")
    return dict(SIZES[architecture][name])


def count_parameters(module: nn.Module) -> int:
    """How many numbers are learned; the module may be on the meta device."""
    return sum(parameter.numel() for parameter in module.parameters())


def condition_shapes(
    model: TokenTransformer, text_length: int = TEXT_LENGTH
) -> dict[str, tuple[int, ...]]:
    """The keywords of a row's condition, each with its shape, the batch's axis left out."""
    c = model.config
    if isinstance(model, MaskGiTUViT):
        return {
            "encoder_hidden_states": (text_length, c.encoder_hidden_size),
            "cond_embeds": (c.cond_embed_dim,),
            "micro_conds": (c.micro_cond_embed_dim // c.micro_cond_encode_dim,),
        }
    if c.add_cross_attention:
        return {"encoder_hidden_states": (text_length, c.encoder_hidden_size)}
    return {}


def flops_per_token(
    model: TokenTransformer, length: int, scored: float = 1.0
) -> tuple[float, float]:
    """(forward pass, forward and backward pass): operations for each of a row's `length` tokens.

    For a model on the meta device. A multiplication and an addition are two; a row's condition is
    spread over its tokens. scored: the share of tokens that get logits.
    """
    condition = {
        name: torch.empty(1, *shape, device="meta")
        for name, shape in condition_shapes(model).items()
    }
    input_ids = torch.empty(1, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(input_ids, **condition)  # (1, T, E)
        logits = model.logits(hidden[0, : round(scored * length)])
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward / length, counter.get_total_flops() / length


def size_table(architecture: str = "transformer") -> str:
    """The presets in Markdown: the transformer as for ImageNet, the U-ViT as published."""
    rows = [
        "| size | width | layers | heads | parameters | MFLOP a token | in training | "
        "weights + AdamW |",
        "| --- " * 8 + "|",
    ]
    for name, fields in SIZES[architecture].items():
        with torch.device("meta"):
            given = CLASS_CONDITIONAL if architecture == "transformer" else {}
            model = MODELS[architecture](**fields, **given)
        parameters = count_parameters(model)
        forward, training = flops_per_token(model, CODES + bool(given))
        rows.append(
            f"| {name} | {fields['hidden_size']} | {fields['num_hidden_layers']} "
            f"| {fields['num_attention_heads']} | {parameters / 1e6:,.1f} M "
            f"| {forward / 1e6:,.0f} | {training / 1e6:,.0f} | {3 * 4 * parameters / 1e9:.2f} GB |"
        )
    return "\n".join(rows)


def main() -> int:
    """Prints a table for each architecture."""
    for architecture, model in MODELS.items():
        print(f"{model.__name__}\n\n{size_table(architecture)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
