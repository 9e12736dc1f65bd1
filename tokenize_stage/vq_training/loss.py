"""What the VQ trainer minimises: a weighted sum of named terms, one line each.

A perceptual or an adversarial term is one more entry of `terms`, with its weight.
"""

import torch
import torch.nn.functional as F


def vq_loss(
    pixels: torch.Tensor,
    reconstruction: torch.Tensor,
    quantizer_loss: torch.Tensor,
    quantizer_weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pixels and reconstruction (B, 3, H, W) -> (loss to minimise, its unweighted terms by name).

    quantizer_loss: codebook + commitment, as the model returns it.
    """
    terms = {
        "reconstruction": F.mse_loss(reconstruction.float(), pixels),
        "quantizer": quantizer_loss,
    }
    return terms["reconstruction"] + quantizer_weight * terms["quantizer"], terms
