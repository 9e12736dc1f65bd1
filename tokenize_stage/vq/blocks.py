"""What the VQ models are built of: residual and attention blocks, taming's encoder and decoder.

Between pixels and codes (step 3) and between codes and pixels (step 9). Parameter names are those
of the published checkpoints. B batch, H x W pixels, h x w grid, C channels, D latent channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenize_stage.vq.model import VQModel
from tokenize_stage.vq.quantizer import VectorQuantizer

GROUPS = 32  # of every GroupNorm

Norm = Callable[[int], nn.Module]  # channels -> a norm of (B, C, h, w), see `ResBranch.branch`
Projection = Callable[[int, int], nn.Linear | nn.Conv2d]  # channels in, out -> a 1x1 map
conv1x1: Projection = partial(nn.Conv2d, kernel_size=1)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResBranch(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice: what a residual block adds to its shortcut."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        dropout: float,
        bias: bool = True,
        norm: Norm = group_norm,
    ):
        super().__init__()
        self.norm1 = norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)
        self.norm2 = norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=bias)

    def branch(self, x: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w). `condition` is what MOVQ's norms read besides."""
        h = self.conv1(F.silu(self.norm1(x, *condition)))
        return self.conv2(self.dropout(F.silu(self.norm2(h, *condition))))


class ResBlock(ResBranch):
    """Taming's residual block: the shortcut is the input, widened by a 1x1 convolution."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float, norm: Norm):
        super().__init__(channels_in, channels_out, dropout, norm=norm)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + self.branch(x, *condition)


class AttentionBlock(nn.Module):
    """Attention with a single head among all positions, its softmax in float32."""

    def __init__(self, channels: int, projection: Projection, norm: Norm):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v = (projection(channels, channels) for _ in range(3))
        self.proj_out = projection(channels, channels)

    def forward(self, x: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        h = self.norm(x, *condition).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h*w, C)
        q, k, v = (pointwise(layer, h) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + pointwise(self.proj_out, h).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


def pointwise(layer: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A Linear or 1x1 convolution on (..., C): both are the same map, of other-shaped weights."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class Level(nn.Module):
    """The blocks of one resolution and, in all but the last, the way to the next one.

    `widths` are the channels before, between and after the residual blocks. A quirk that
    checkpoints depend on: a single attention block (an encoder level with one residual block) is
    made but never applied.
    """

    def __init__(
        self,
        widths: Sequence[int],
        res_block: Callable[[int, int], ResBlock],
        attention: Callable[[int], AttentionBlock] | None,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ):
        super().__init__()
        self.block = nn.ModuleList(map(res_block, widths[:-1], widths[1:]))
        self.attn = nn.ModuleList(map(attention, widths[1:]) if attention else ())
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x = block(x, *condition)
            if len(self.attn) > 1:
                x = self.attn[i](x, *condition)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Middle(nn.Module):
    """Two residual blocks at the coarsest resolution, with or without attention between them."""

    def __init__(
        self,
        width: int,
        res_block: Callable[[int, int], ResBlock],
        attention: Callable[[int], AttentionBlock] | None,
    ):
        super().__init__()
        self.block_1 = res_block(width, width)
        self.attn_1 = attention(width) if attention else None
        self.block_2 = res_block(width, width)

    def forward(self, x: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        x = self.block_1(x, *condition)
        x = x if self.attn_1 is None else self.attn_1(x, *condition)
        return self.block_2(x, *condition)


class Downsample(nn.Module):
    """Halves the sides: a 3x3 convolution over zeros padded right and below, or 2x2 averages."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides by repeating, then a 3x3 convolution or nothing."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


@dataclass
class TamingConfig:
    """What the taming tokenizers' configs share; the defaults are VQGANModel's."""

    resolution: int = 256
    """Side of the images it is trained on: with attn_resolutions, it places the attention."""
    num_channels: int = 3
    """Colour channels."""
    hidden_channels: int = 128
    """Channels at full resolution; a multiple of 32, as every GroupNorm has 32 groups."""
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level over hidden_channels; each level after the first halves the side."""
    num_res_blocks: int = 2
    """Residual blocks of an encoder level; a decoder level has one more."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Levels of these sides, for images of `resolution`, have attention (see Level)."""
    z_channels: int = 256
    """Channels between encoder or decoder and the 1x1 convolutions around the codebook."""
    num_embeddings: int = 1024
    """K, the codebook size."""
    quantized_embed_dim: int = 256
    """D, the numbers in a codebook vector."""
    dropout: float = 0.0
    """Dropout in the residual blocks."""
    resample_with_conv: bool = True
    """Convolutions at every halving and doubling; else averages and plain repetition."""
    commitment_cost: float = 0.25
    """Weight of the codebook term of the quantizer's loss (see VectorQuantizer.loss)."""

    def __post_init__(self) -> None:
        if self.hidden_channels % GROUPS:
            raise ValueError(f"hidden_channels {self.hidden_channels} is no multiple of {GROUPS}")

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.hidden_channels * mult for mult in self.channel_mult]


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) -> (B, z_channels, h, w)."""

    def __init__(self, config: TamingConfig, projection: Projection, mid_attention: bool):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        res_block = partial(ResBlock, dropout=config.dropout, norm=group_norm)
        attention = partial(AttentionBlock, projection=projection, norm=group_norm)
        self.conv_in = nn.Conv2d(config.num_channels, config.hidden_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            steps = [widths[i - 1] if i else config.hidden_channels]
            steps += [width] * config.num_res_blocks
            attends = config.resolution >> i in config.attn_resolutions
            down = Downsample(width, config.resample_with_conv) if i < last else None
            self.down.append(Level(steps, res_block, attention if attends else None, down))
        self.mid = Middle(widths[-1], res_block, attention if mid_attention else None)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(pixels)  # (B, C_0, H, W)
        for level in self.down:
            x = level(x)  # each level but the last halves the sides, finally (B, C_L-1, h, w)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> pixels (B, 3, H, W). `up` is numbered from the finest level."""

    def __init__(
        self,
        config: TamingConfig,
        projection: Projection,
        mid_attention: bool,
        norm: Norm = group_norm,
    ):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        res_block = partial(ResBlock, dropout=config.dropout, norm=norm)
        attention = partial(AttentionBlock, projection=projection, norm=norm)
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], res_block, attention if mid_attention else None)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            steps = [widths[min(i + 1, last)]] + [width] * (config.num_res_blocks + 1)
            side = config.resolution >> last << last - i  # counted up from the coarsest level
            attends = side in config.attn_resolutions
            up = Upsample(width, config.resample_with_conv) if i > 0 else None
            self.up.append(Level(steps, res_block, attention if attends else None, upsample=up))
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.num_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(latents), *condition)  # (B, C_L-1, h, w)
        for level in reversed(self.up):
            x = level(x, *condition)  # each level but the last doubles the sides: (B, C_0, H, W)
        return self.conv_out(F.silu(self.norm_out(x, *condition)))


class TamingVQ(VQModel):
    """What VQGANModel and MOVQ share; each makes its own `encoder` and `decoder`."""

    encoder: Encoder
    decoder: Decoder

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        config: TamingConfig = self.config
        z_channels, dim = config.z_channels, config.quantized_embed_dim
        self.quantize = VectorQuantizer(config.num_embeddings, dim, config.commitment_cost)
        self.quant_conv = nn.Conv2d(z_channels, dim, 1)
        self.post_quant_conv = nn.Conv2d(dim, z_channels, 1)

    @property
    def reduction(self) -> int:
        return 2 ** (len(self.config.channel_mult) - 1)

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(pixels))
