"""VQGANModel: the tokenizer of taming transformers; openMUSE's f16 of 8192 codes, aMUSEd's VQ.

Steps 3 and 9. Parameter names are those of the published checkpoints. B batch, H x W pixels,
h x w grid, D channels of a codebook vector.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tokenize_stage.vq.blocks import Decoder, Encoder, TamingConfig, TamingVQ, conv1x1


@dataclass
class VQGANConfig(TamingConfig):
    no_attn_mid_block: bool = False
    """Leaves the attention between the two middle blocks out."""
    symmetric_pixels: bool = False
    """For taming's checkpoints: pixels enter the encoder as 2x - 1 and leave as (x + 1) / 2."""


class VQGANModel(TamingVQ):
    """encode: pixels in [0, 1] -> codes; decode: codes -> pixels about [0, 1]. See VQModel."""

    config_class = VQGANConfig

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        config: VQGANConfig = self.config
        self.encoder = Encoder(config, conv1x1, mid_attention=not config.no_attn_mid_block)
        self.decoder = Decoder(config, conv1x1, mid_attention=not config.no_attn_mid_block)

    def config_dict(self) -> dict[str, Any]:
        """The content of config.json; a plain model's has only the keys that open-muse knows."""
        config = super().config_dict()
        if not config["symmetric_pixels"]:
            del config["symmetric_pixels"]
        return config

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().latents(2 * pixels - 1 if self.config.symmetric_pixels else pixels)

    def decode_latents(self, quantized: torch.Tensor) -> torch.Tensor:
        pixels = self.decoder(self.post_quant_conv(quantized))
        return (pixels + 1) / 2 if self.config.symmetric_pixels else pixels
