"""Blocks of the U-ViT around its transformer layers: residual convolutions and text attention.

Features stay channels-last, (B, h, w, C): the pointwise layers read them as they are, and the
depthwise convolution as channels_last memory. Parameter names are those of the published
checkpoints. B batch, h x w grid, C channels, S text positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_stage.models.layers import AdaLN, Attention, NormStyle, modulate

Pair = tuple[Tensor, Tensor]


def to_images(x: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, C, h, w), the same memory."""
    return x.permute(0, 3, 1, 2)


def to_features(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h, w, C), the same memory."""
    return x.permute(0, 2, 3, 1)


class GlobalResponseNorm(nn.Module):
    """Channels compete by their norm over the grid (Woo et al. 2023, ConvNeXt V2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # (B, 1, 1, C)
        share = energy / (energy.mean(-1, keepdim=True) + 1e-6)
        return x * (self.gamma * share + 1.0) + self.beta


class ResBlock(nn.Module):
    """Depthwise convolution, norm, pointwise expansion; AdaLN on the sum with the input."""

    def __init__(
        self, channels: int, style: NormStyle, bias: bool, dropout: float, cond_width: int
    ):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)
        self.norm = nn.ModuleDict({"norm": style.norm(channels)})
        self.channelwise = nn.Sequential(
            nn.Linear(channels, 4 * channels, bias=bias),
            nn.GELU(),
            GlobalResponseNorm(4 * channels),
            nn.Dropout(dropout),
            nn.Linear(4 * channels, channels, bias=bias),
        )
        self.adaLN_modulation = AdaLN(channels, cond_width, bias)

    def context(self, text: Tensor, cond: Tensor) -> Pair:
        """Scale and shift (B, 1, 1, C) from cond (B, cond_width)."""
        scale, shift = self.adaLN_modulation.context(cond)
        return scale.unsqueeze(1), shift.unsqueeze(1)

    def forward(
        self,
        x: Tensor,
        text: Tensor | None,
        cond: Tensor | None,
        bias: Tensor | None,
        context: Pair | None = None,
    ) -> Tensor:
        """x (B, h, w, C) -> the same shape."""
        context = self.context(text, cond) if context is None else context  # type: ignore[arg-type]
        h = to_features(self.depthwise(to_images(x)))
        return modulate(x + self.channelwise(self.norm["norm"](h)), context)


class AttentionContext(NamedTuple):
    """Keys and values (B, S, H, d) of the text for the two attentions of a TextAttention."""

    attention: Pair
    crossattention: Pair


class TextAttention(nn.Module):
    """Attention to the text, twice. The first one is called self-attention in the published
    models and has its name, but it reads the text too: a quirk that their weights depend on.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        text_width: int,
        style: NormStyle,
        bias: bool,
        dropout: float,
    ):
        super().__init__()
        if text_width != channels:
            self.kv_mapper = nn.Linear(text_width, channels, bias=bias)
        self.attn_layer_norm = style.norm(channels)
        self.attention = Attention(channels, heads, channels, bias, dropout)
        self.crossattn_layer_norm = style.norm(channels)
        self.crossattention = Attention(channels, heads, channels, bias, dropout)

    def context(self, text: Tensor, cond: Tensor) -> AttentionContext:
        """From text (B, S, text_width)."""
        if hasattr(self, "kv_mapper"):
            text = self.kv_mapper(F.silu(text))  # (B, S, C)
        return AttentionContext(self.attention.context(text), self.crossattention.context(text))

    def forward(
        self,
        x: Tensor,
        text: Tensor | None,
        cond: Tensor | None,
        bias: Tensor | None,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """x (B, h, w, C), bias (B, 1, 1, S) on the text -> the same shape as x."""
        context = self.context(text, cond) if context is None else context  # type: ignore[arg-type]
        tokens = x.flatten(1, 2)  # (B, N, C)
        h = self.attn_layer_norm(tokens)
        tokens = tokens + self.attention(h, context.attention, bias)
        h = self.crossattn_layer_norm(tokens)
        tokens = tokens + self.crossattention(h, context.crossattention, bias)
        return tokens.view(x.shape)


class Stage(nn.Module):
    """A down or up block: residual and attention blocks in turn, at half the grid if asked for."""

    def __init__(
        self,
        pairs: list[tuple[ResBlock, TextAttention]],
        channels: int,
        style: NormStyle,
        bias: bool,
        resample: str | None = None,
    ):
        super().__init__()
        self.res_blocks = nn.ModuleList(res for res, _ in pairs)
        self.attention_blocks = nn.ModuleList(attention for _, attention in pairs)
        norm = nn.ModuleDict({"norm": style.norm(channels)})
        if resample == "down":
            conv: nn.Module = nn.Conv2d(channels, channels, 2, stride=2, bias=bias)
            self.downsample = nn.ModuleList([norm, conv])
        elif resample == "up":
            conv = nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=bias)
            self.upsample = nn.ModuleList([norm, conv])

    def blocks(self) -> list[nn.Module]:
        """In the order in which they run."""
        pairs = zip(self.res_blocks, self.attention_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    def resampled(self, x: Tensor, name: str) -> Tensor:
        """x (B, h, w, C) on half the grid ("downsample") or twice the grid ("upsample")."""
        if not hasattr(self, name):
            return x
        norm, conv = getattr(self, name)
        return to_features(conv(to_images(norm["norm"](x))))
