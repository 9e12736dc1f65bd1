"""How good a VQ model is on images it was not trained on: PSNR, use of the codebook, a picture."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from storage.atomic import atomic_file
from tokenize_stage.vq.model import VQModel
from tokenize_stage.vq_training.codebook import perplexity
from tokenize_stage.vq_training.images import to_pixels


@torch.no_grad()
def evaluate(
    model: VQModel, images: np.ndarray, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Measures reconstructions, clipped to [0, 1], of (n, 3, R, R) uint8 images, in float32.

    psnr: 10 log10(1 / mean squared error over all pixels), in dB; psnr_image_mean: the mean of
    each image's own; codes_used and perplexity (effective number of codes) over all images.
    """
    was_training = model.training
    model.eval()
    errors, counts = [], torch.zeros(model.codebook_size, dtype=torch.int64)
    for start in range(0, len(images), batch_size):
        pixels = to_pixels(images[start : start + batch_size], device)
        reconstruction, _, codes = model(pixels)
        errors.append((reconstruction.clamp(0, 1) - pixels).square().mean(dim=(1, 2, 3)))  # (B,)
        counts += torch.bincount(codes.flatten(), minlength=model.codebook_size).cpu()
    model.train(was_training)
    mse = torch.cat(errors).double()  # (n,)
    return {
        "psnr": float(-10 * mse.mean().log10()),
        "psnr_image_mean": float(-10 * mse.clamp(min=1e-10).log10().mean()),
        "codes_used": int((counts > 0).sum()),
        "perplexity": perplexity(counts),
    }


@torch.no_grad()
def save_reconstructions(
    model: VQModel, images: np.ndarray, path: Path, device: torch.device, columns: int = 16
) -> None:
    """Writes a PNG with rows of originals, each over the row of their reconstructions."""
    was_training = model.training
    model.eval()
    images = images[: 4 * columns]
    columns = min(columns, len(images))
    images = images[: len(images) // columns * columns]
    pixels = model(to_pixels(images, device))[0].clamp(0, 1)
    model.train(was_training)
    rebuilt = (pixels * 255).round().byte().cpu().numpy()  # (n, 3, R, R)
    pairs = np.stack([rows.reshape(-1, columns, *images.shape[1:]) for rows in (images, rebuilt)])
    grid = pairs.transpose(1, 0, 4, 2, 5, 3)  # (rows, 2, R, columns, R, 3)
    height, width = grid.shape[0] * 2 * grid.shape[2], columns * grid.shape[4]
    with atomic_file(path) as temporary:
        Image.fromarray(grid.reshape(height, width, 3)).save(temporary, format="PNG")
