"""How alike two sets of pictures are: PSNR and SSIM. Pixels are RGB in [0, 1], (n, 3, H, W)."""

import torch
import torch.nn.functional as F

WINDOW, SIGMA = 11, 1.5  # of SSIM's weights, in pixels
C1, C2 = 0.01**2, 0.03**2


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """10 log10(1 / mean squared error over all pixels) in dB; inf for equal pictures."""
    error = (one.double() - other.double()).square().mean()
    return float(-10 * error.log10())


def ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004), of every channel, over all pictures; 1: equal.

    Gaussian weights, population covariances, no padding. Raises ValueError below 11 pixels.
    """
    if min(one.shape[-2:]) < WINDOW:
        raise ValueError(f"pictures of {tuple(one.shape[-2:])} pixels: SSIM needs {WINDOW}")
    x, y = one.double().flatten(0, 1)[:, None], other.double().flatten(0, 1)[:, None]
    mean_x, mean_y = _weighted(x), _weighted(y)  # (3n, 1, H - 10, W - 10)
    variance = _weighted(x * x) + _weighted(y * y) - mean_x**2 - mean_y**2  # of x plus of y
    covariance = _weighted(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return float((luminance * (2 * covariance + C2) / (variance + C2)).mean())


def _weighted(images: torch.Tensor) -> torch.Tensor:
    """Means under a Gaussian window at every place where it fits: (m, 1, H, W) -> smaller by 10."""
    places = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = torch.softmax(-(places**2) / (2 * SIGMA**2), 0)
    return F.conv2d(F.conv2d(images, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
