"""MaskGitVQGAN: the tokenizer of MaskGIT, f16 with 1024 codes as published for ImageNet.

Purely convolutional; parameter names are those of the published checkpoints.
B batch, H x W pixels, h x w grid, C channels, D latent channels, L levels.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenize_stage.vq.blocks import GROUPS, ResBranch, group_norm
from tokenize_stage.vq.model import VQModel
from tokenize_stage.vq.quantizer import VectorQuantizer


@dataclass
class MaskGitVQGANConfig:
    resolution: int = 256
    """Side, in pixels, of the square images it is trained on."""
    num_channels: int = 3
    """Colour channels."""
    hidden_channels: int = 128
    """Channels at full resolution; a multiple of 32, as every GroupNorm has 32 groups."""
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level over hidden_channels; each level after the first halves the side."""
    num_res_blocks: int = 2
    """Residual blocks of each level, of encoder and decoder alike."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Unused (there is no attention); published configs carry it."""
    z_channels: int = 256
    """Numbers in a latent vector."""
    num_embeddings: int = 1024
    """K, the codebook size."""
    quantized_embed_dim: int = 256
    """Numbers in a codebook vector; must equal z_channels."""
    dropout: float = 0.0
    """Dropout in the residual blocks."""
    resample_with_conv: bool = True
    """Unused; published configs carry it."""
    commitment_cost: float = 0.25
    """Weight of the codebook term of the quantizer's loss (see VectorQuantizer.loss)."""

    def __post_init__(self) -> None:
        if self.quantized_embed_dim != self.z_channels:
            raise ValueError(
                f"quantized_embed_dim {self.quantized_embed_dim} must equal z_channels "
                f"{self.z_channels}: MaskGitVQGAN has no convolution between them"
            )
        if self.hidden_channels % GROUPS:
            raise ValueError(f"hidden_channels {self.hidden_channels} is no multiple of {GROUPS}")


class ResBlock(ResBranch):
    """The residual branch, without biases, beside a shortcut.

    A quirk of the published weights that is kept: where the number of channels changes, the
    shortcut's 1x1 convolution reads the result of conv2, so the block's input is not used.
    """

    def __init__(self, channels_in: int, channels_out: int, dropout: float):
        super().__init__(channels_in, channels_out, dropout, bias=False)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_out, channels_out, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.branch(x)  # (B, C_out, h, w)
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


def res_blocks(channels_in: int, channels_out: int, config: MaskGitVQGANConfig) -> nn.ModuleList:
    """The residual blocks of one level; the first changes the number of channels."""
    widths = [channels_in] + [channels_out] * config.num_res_blocks
    blocks = zip(widths[:-1], widths[1:], strict=True)
    return nn.ModuleList(ResBlock(c_in, c_out, config.dropout) for c_in, c_out in blocks)


class Level(nn.Module):
    """The residual blocks of one resolution and, in the decoder, the way up to the next."""

    def __init__(
        self, channels_in: int, channels: int, config: MaskGitVQGANConfig, upsample: bool = False
    ):
        super().__init__()
        self.block = res_blocks(channels_in, channels, config)
        if upsample:
            self.upsample_conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "upsample_conv"):
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) -> latents (B, D, h, w)."""

    def __init__(self, config: MaskGitVQGANConfig):
        super().__init__()
        widths = [config.hidden_channels * mult for mult in (1, *config.channel_mult)]
        levels = zip(widths[:-1], widths[1:], strict=True)
        self.conv_in = nn.Conv2d(config.num_channels, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(c_in, c_out, config) for c_in, c_out in levels)
        self.mid = res_blocks(widths[-1], widths[-1], config)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.down[0](self.conv_in(pixels))  # (B, C_0, H, W)
        for level in self.down[1:]:
            x = level(F.avg_pool2d(x, 2))  # each level halves the side, finally (B, C_L-1, h, w)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, D, h, w)


class Decoder(nn.Module):
    """Quantized latents (B, D, h, w) -> pixels (B, 3, H, W). `up` is numbered from the finest."""

    def __init__(self, config: MaskGitVQGANConfig):
        super().__init__()
        widths = [config.hidden_channels * mult for mult in config.channel_mult]
        levels = list(enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)))
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = res_blocks(widths[-1], widths[-1], config)
        self.up = nn.ModuleList(
            Level(c_in, c_out, config, upsample=i > 0) for i, (c_in, c_out) in levels
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.num_channels, 3, padding=1)

    def forward(self, quantized: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(quantized)  # (B, C_L-1, h, w)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)  # each level but the last doubles the side, finally (B, C_0, H, W)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


class MaskGitVQGAN(VQModel):
    """encode: pixels in [0, 1] -> codes; decode: codes -> pixels about [0, 1]. See VQModel."""

    config_class = MaskGitVQGANConfig

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        config: MaskGitVQGANConfig = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(
            config.num_embeddings, config.quantized_embed_dim, config.commitment_cost
        )

    @property
    def reduction(self) -> int:
        return 2 ** (len(self.config.channel_mult) - 1)

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixels)

    def decode_latents(self, quantized: torch.Tensor) -> torch.Tensor:
        return self.decoder(quantized)
