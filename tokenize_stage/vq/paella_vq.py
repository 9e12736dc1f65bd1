"""PaellaVQModel: the tokenizer of Paella, f4 and f8 with 8192 codes of 4 numbers.

Steps 3 and 9. Parameter names are those of the published checkpoints, made for inference. B batch,
H x W pixels, C channels, h x w grid of the features, D channels of a codebook vector.
Source: Rampas et al. 2022, "Fast text-conditional discrete denoising on vector-quantized latents".
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenize_stage.vq.model import VQModel
from tokenize_stage.vq.quantizer import VectorQuantizer


@dataclass
class PaellaVQConfig:
    levels: int = 2
    """Resolutions; a code stands for 2**levels pixels a side."""
    bottleneck_blocks: int = 12
    """Residual blocks of the decoder at the coarsest resolution; every other place has one."""
    c_hidden: int = 384
    """Channels at the coarsest resolution, halved at each finer one."""
    c_latent: int = 4
    """D, the numbers in a codebook vector."""
    codebook_size: int = 8192
    """K, the codebook size."""
    scale_factor: float = 0.3764
    """What quantized latents are divided by outside of the model (encode_latents)."""


class ResBlock(nn.Module):
    """A depthwise convolution, then two pointwise layers, with six learned scalars, at first 0."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.ReplicationPad2d(1), nn.Conv2d(channels, channels, 3, groups=channels)
        )
        self.channelwise = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # then no permute below moves data
        g = self.gammas
        h = channel_norm(x.permute(0, 2, 3, 1), g[0], g[1])  # (B, h, w, C)
        x = torch.addcmul(x, self.depthwise(h.permute(0, 3, 1, 2)), g[2])
        h = channel_norm(x.permute(0, 2, 3, 1), g[3], g[4])
        return torch.addcmul(x, self.channelwise(h).permute(0, 3, 1, 2), g[5])


def channel_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last axis, times 1 + scale, plus shift (both scalars)."""
    size = x.shape[-1:]
    return F.layer_norm(x, size, (1 + scale).expand(size), shift.expand(size), eps=1e-6)


class PaellaQuantizer(VectorQuantizer):
    """VectorQuantizer with the published name of its parameter, `codebook`."""

    def __init__(self, codebook_size: int, dim: int):
        super().__init__(codebook_size, dim)
        self.codebook = self.embedding
        del self.embedding

    @property
    def vectors(self) -> torch.Tensor:
        return self.codebook.weight


class PaellaVQModel(VQModel):
    """encode: pixels in [0, 1] -> codes; decode: codes -> pixels about [0, 1]. See VQModel.

    In training mode its BatchNorm learns the latents' statistics; load it (or call eval) to encode.
    """

    config_class = PaellaVQConfig

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        config: PaellaVQConfig = self.config
        widths = [config.c_hidden >> level for level in reversed(range(config.levels))]
        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 1))
        self.down_blocks = nn.Sequential(*down_blocks(widths, config.c_latent))
        self.vquantizer = PaellaQuantizer(config.codebook_size, config.c_latent)
        self.up_blocks = nn.Sequential(
            *up_blocks(widths, config.c_latent, config.bottleneck_blocks)
        )
        self.out_block = nn.Sequential(nn.Conv2d(widths[0], 12, 1), nn.PixelShuffle(2))

    @property
    def reduction(self) -> int:
        return 2**self.config.levels

    @property
    def num_channels(self) -> int:
        return 3

    @property
    def quantizer(self) -> VectorQuantizer:
        return self.vquantizer

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.down_blocks(self.in_block(pixels))

    def encode_latents(self, pixels: torch.Tensor, return_loss: bool = False) -> tuple:
        """Pixels -> (quantized / scale_factor (B, D, h, w), codes (B, N)[, loss])."""
        quantized, *rest = super().encode_latents(pixels, return_loss)
        return quantized / self.config.scale_factor, *rest

    def decode_latents(self, quantized: torch.Tensor) -> torch.Tensor:
        return self.pixels(quantized * self.config.scale_factor)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.pixels(self.lookup(codes))  # the codebook itself is not scaled

    def pixels(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors of the codebook (B, D, h, w) -> pixels (B, 3, H, W)."""
        return self.out_block(self.up_blocks(vectors))

    def forward(self, pixels: torch.Tensor, return_loss: bool = False) -> tuple | torch.Tensor:
        """Pixels -> reconstruction alone, as in open-muse, or (reconstruction, loss)."""
        quantized, _, *loss = self.encode_latents(pixels, return_loss)
        reconstruction = self.decode_latents(quantized)
        return (reconstruction, *loss) if return_loss else reconstruction


def down_blocks(widths: list[int], dim: int) -> list[nn.Module]:
    """From the finest width to latents of `dim` channels, normalised over the training set."""
    blocks: list[nn.Module] = [ResBlock(widths[0])]
    for finer, width in zip(widths[:-1], widths[1:], strict=True):
        blocks += [nn.Conv2d(finer, width, 4, stride=2, padding=1), ResBlock(width)]
    latents = nn.Sequential(nn.Conv2d(widths[-1], dim, 1, bias=False), nn.BatchNorm2d(dim))
    return [*blocks, latents]


def up_blocks(widths: list[int], dim: int, bottleneck_blocks: int) -> list[nn.Module]:
    """From quantized latents of `dim` channels to the finest width."""
    blocks: list[nn.Module] = [nn.Sequential(nn.Conv2d(dim, widths[-1], 1))]
    blocks += [ResBlock(widths[-1]) for _ in range(bottleneck_blocks)]
    for width, finer in zip(widths[:0:-1], widths[-2::-1], strict=True):
        blocks += [nn.ConvTranspose2d(width, finer, 4, stride=2, padding=1), ResBlock(finer)]
    return blocks
