"""MOVQ: the tokenizer of Kandinsky 2; openMUSE's f8 of 16384 codes.

Steps 3 and 9. VQGANModel with Linear layers in its attention and a decoder whose every norm reads
the quantized tensor. B batch, C channels, h x w grid of the features, h0 x w0 grid of the codes,
D channels of a codebook vector. Source: Zheng et al. 2022, "MoVQ", section 3.2.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenize_stage.vq.blocks import Decoder, Encoder, TamingConfig, TamingVQ, group_norm


@dataclass
class MOVQConfig(TamingConfig):
    channel_mult: tuple[int, ...] = (1, 2, 2, 4)
    attn_resolutions: tuple[int, ...] = (32,)
    z_channels: int = 4
    num_embeddings: int = 16384
    quantized_embed_dim: int = 4
    out_channels: int = 3
    """Unused (pixels leave with num_channels); published configs carry it."""
    double_z: bool = False
    """Unused; published configs carry it."""


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift are maps of the quantized tensor at the same place."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.norm_layer = group_norm(channels)
        self.conv_y = nn.Conv2d(dim, channels, 1)
        self.conv_b = nn.Conv2d(dim, channels, 1)

    def forward(self, x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w), (B, D, h0, w0) -> (B, C, h, w)."""
        # 1x1 maps commute with repeating pixels, and are the cheaper the fewer those are.
        scale, shift = (
            F.interpolate(conv(quantized), size=x.shape[2:], mode="nearest")
            for conv in (self.conv_y, self.conv_b)
        )
        return torch.addcmul(shift, self.norm_layer(x), scale)


class MOVQ(TamingVQ):
    """encode: pixels in [0, 1] -> codes; decode: codes -> pixels about [0, 1]. See VQModel."""

    config_class = MOVQConfig

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        config: MOVQConfig = self.config
        norm = partial(SpatialNorm, dim=config.quantized_embed_dim)
        self.encoder = Encoder(config, nn.Linear, mid_attention=True)
        self.decoder = Decoder(config, nn.Linear, mid_attention=True, norm=norm)

    def decode_latents(self, quantized: torch.Tensor) -> torch.Tensor:
        # the norms see the quantized tensor as it is, before post_quant_conv
        return self.decoder(self.post_quant_conv(quantized), quantized)

    def forward(self, pixels: torch.Tensor, return_loss: bool = False) -> tuple:
        """Pixels -> (reconstruction, codes[, loss]): as in open-muse, no quantized tensor."""
        quantized, *codes_and_loss = self.encode_latents(pixels, return_loss)
        return self.decode_latents(quantized), *codes_and_loss
