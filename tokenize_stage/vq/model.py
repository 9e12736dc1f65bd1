"""What every VQ model offers: pixels -> codes (encode, step 3), codes -> pixels (decode, step 9).

A model gives the two halves around its codebook, `latents` and `decode_latents`; the rest is here.
B batch, H x W pixels, h x w grid, N = h*w codes an image, D channels of a codebook vector.
"""

import math
from pathlib import Path
from typing import Self

import torch

from storage.pretrained import PretrainedModel
from tokenize_stage.vq.quantizer import VectorQuantizer


class VQModel(PretrainedModel):
    """An encoder, a codebook and a decoder. Pixels are RGB in [0, 1], (B, 3, H, W), both ways."""

    quantize: VectorQuantizer

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Loads a model directory or hub repository, in eval mode and frozen.

        A loaded VQ model is a fixed measure; to train it on, call requires_grad_(True).
        """
        model = super().from_pretrained(name_or_path, subfolder, revision, dtype)
        return model.requires_grad_(False)

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> what the codebook quantizes (B, D, h, w)."""
        raise NotImplementedError

    def decode_latents(self, quantized: torch.Tensor) -> torch.Tensor:
        """Quantized latents (B, D, h, w) -> pixels (B, 3, H, W); open-muse called this `decode`."""
        raise NotImplementedError

    @property
    def reduction(self) -> int:
        """Pixels along one side of a code."""
        raise NotImplementedError

    @property
    def num_channels(self) -> int:
        """Colour channels, almost always 3."""
        return self.config.num_channels

    @property
    def quantizer(self) -> VectorQuantizer:
        """The codebook and its search."""
        return self.quantize

    @property
    def codebook_size(self) -> int:
        """K: codes are in [0, K)."""
        return len(self.quantizer.vectors)

    @property
    def num_embeddings(self) -> int:
        """Old name of `codebook_size`."""
        return self.codebook_size

    def grid(self, height: int, width: int | None = None) -> tuple[int, int]:
        """(h, w) of the codes of an image of `height` x `width` pixels, square without a width."""
        return height // self.reduction, (width or height) // self.reduction

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> codes (B, N) int64, row by row.

        Raises ValueError for sides that are no multiple of `reduction`: the rest would be lost.
        """
        sides = pixels.shape[-2:]
        if any(side % self.reduction for side in sides):
            h, w = (max(side - side % self.reduction, self.reduction) for side in sides)
            raise ValueError(
                f"images of {sides[0]} x {sides[1]} pixels: both sides must be multiples of "
                f"{self.reduction}, the pixels along a side of one code; crop or resize them, "
                f"for instance to {h} x {w}"
            )
        return self.encode_latents(pixels)[1]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (B, N) of a square grid, or (B, h, w) -> pixels (B, 3, H, W) about [0, 1].

        The pixels are not clamped. Raises ValueError for latents and for an N that is no square.
        """
        return self.decode_latents(self.lookup(codes))

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes as `decode` takes them -> their vectors in the codebook (B, D, h, w)."""
        if codes.is_floating_point():
            raise ValueError(
                f"decode takes integer codes, not {codes.dtype} of shape {tuple(codes.shape)}; "
                "for quantized latents call decode_latents"
            )
        side = math.isqrt(codes[0].numel())
        grid = (side, side) if codes.ndim == 2 else (codes.shape[1], codes.shape[2])
        if codes.ndim == 2 and side * side != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} codes are no square grid; give them as (B, h, w)")
        return self.quantizer.lookup(codes.flatten(1), grid)

    def get_code(self, pixels: torch.Tensor) -> torch.Tensor:
        """Old name of `encode`."""
        return self.encode(pixels)

    def decode_code(self, codes: torch.Tensor) -> torch.Tensor:
        """Old name of `decode`."""
        return self.decode(codes)

    def encode_latents(self, pixels: torch.Tensor, return_loss: bool = False) -> tuple:
        """Pixels -> (quantized (B, D, h, w), codes (B, N)[, loss]); open-muse called this `encode`.

        With return_loss, the quantized values pass gradients straight through to the encoder. Of
        sides that are no multiple of `reduction` the rest is left out, as in open-muse.
        """
        return self.quantizer(self.latents(self._checked(pixels)), return_loss)

    def get_soft_code(
        self,
        pixels: torch.Tensor,
        temp: float = 1.0,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels -> (probability of every code (B, N, K), codes (B, N): the nearest or drawn).

        The softmax of -squared distance / temp, for every class (open-muse: MaskGitVQGAN alone).
        """
        latents = self.latents(self._checked(pixels))
        return self.quantizer.soft_codes(latents, temp, stochastic, generator)

    def forward(self, pixels: torch.Tensor, return_loss: bool = False) -> tuple | torch.Tensor:
        """Pixels -> (reconstruction (B, 3, H, W), quantized (B, D, h, w), codes (B, N)[, loss])."""
        quantized, codes, *loss = self.encode_latents(pixels, return_loss)
        return self.decode_latents(quantized), quantized, codes, *loss

    def _checked(self, pixels: torch.Tensor) -> torch.Tensor:
        """The pixels themselves. Raises ValueError for what cannot be a batch of pictures."""
        if pixels.ndim == 4 and pixels.shape[1] == self.num_channels and pixels.is_floating_point():
            return pixels
        advice = " (8-bit images: pixels.float() / 255)" if pixels.dtype == torch.uint8 else ""
        raise ValueError(
            f"pixels are floats in [0, 1] of shape (B, {self.num_channels}, H, W){advice}, not "
            f"{pixels.dtype} of shape {tuple(pixels.shape)}"
        )
