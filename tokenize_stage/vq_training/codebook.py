"""Keeping a codebook alive while it is trained: where codes start, what becomes of unused ones.

K codes of D numbers; M latent vectors, the encoder's outputs. Randomness comes from numpy
generators that the caller makes, so that a step draws the same on every device and after a resume.
"""

import numpy as np
import torch

from tokenize_stage.vq.quantizer import nearest_codes


def cluster(
    vectors: torch.Tensor, size: int, rng: np.random.Generator, rounds: int = 10
) -> torch.Tensor:
    """k-means of (M, D) vectors -> `size` centres (K, D).

    Seeds are drawn as in k-means++, but doubling their number each time. A centre that loses all
    its vectors starts anew. Raises ValueError for fewer vectors than centres.
    """
    if len(vectors) < size:
        raise ValueError(f"{len(vectors)} vectors cannot be clustered into {size} codes")
    centres = vectors[_draw(torch.ones(len(vectors)), 1, rng)]
    while len(centres) < size:
        more = min(len(centres), size - len(centres))
        centres = torch.cat([centres, vectors[_draw(_errors(vectors, centres), more, rng)]])
    for _ in range(rounds):
        codes = nearest_codes(vectors, centres)  # (M,)
        counts = torch.bincount(codes, minlength=size)  # (K,)
        sums = torch.zeros_like(centres).index_add_(0, codes, vectors)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        revive(centres, counts > 0, vectors, rng)
    return centres


def revive(
    codebook: torch.Tensor, used: torch.Tensor, vectors: torch.Tensor, rng: np.random.Generator
) -> torch.Tensor:
    """Moves the codes that are not `used` ((K,) bool) onto vectors, in place.

    Vectors far from their code are the likelier to be drawn, as in k-means++. Returns the
    indices of the moved codes, at most one a vector.
    """
    unused = torch.nonzero(~used).flatten()[: len(vectors)]
    codebook[unused] = vectors[_draw(_errors(vectors, codebook), len(unused), rng)]
    return unused


def perplexity(counts: torch.Tensor) -> float:
    """exp(entropy) of how often each code was used: the number of codes in effective use."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def _errors(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared distance of each vector to its code (M,)."""
    return (vectors - codebook[nearest_codes(vectors, codebook)]).square().sum(dim=1)


def _draw(weights: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """`count` distinct indices, drawn with probabilities in proportion to (M,) weights.

    Each index waits an exponential time at the rate of its weight; the first ones are taken.
    """
    waits = rng.exponential(size=len(weights)) / np.maximum(weights.double().cpu().numpy(), 1e-30)
    return torch.from_numpy(np.argsort(waits, kind="stable")[:count]).to(weights.device)
