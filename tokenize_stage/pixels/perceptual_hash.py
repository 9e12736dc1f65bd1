"""pHash: 64 bits that pictures of the same thing share, however they were scaled or compressed.

As the ImageHash library defines `phash`, and so COYO's `image_phash`: gray, 32 x 32, the 8 x 8
lowest frequencies of its cosine transform, each compared with their median.
"""

import numpy as np
import torch
from PIL import Image

SIDE, KEPT = 32, 8
FLAT = 8  # gray levels between the darkest and the lightest of the 32 x 32: less is noise
_places = np.arange(SIDE)
_DCT = np.cos(np.pi * np.outer(np.arange(KEPT), 2 * _places + 1) / (2 * SIDE))  # (8, 32): DCT-II


def phash(pixels: torch.Tensor) -> str | None:
    """(3, h, w) uint8 -> 16 hex digits; None for a picture too flat to have a structure."""
    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).convert("L")
    gray = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    if np.ptp(gray) < FLAT:
        return None
    low = (_DCT @ gray @ _DCT.T).round(6)  # (8, 8); stripes have zeros: no bits out of rounding
    bits = (low > np.median(low)).flatten()
    return np.packbits(bits).tobytes().hex()
