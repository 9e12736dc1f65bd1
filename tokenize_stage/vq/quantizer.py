"""The vector quantizer of every VQ model: latent vectors -> codes (step 3) and codes -> vectors.

B batch, N = h*w codes an image, K codebook size, D latent channels, M = B*N vectors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Distances held at once (rows x K), so memory stays flat: small enough for a CPU's cache.
_CPU_DISTANCES, _GPU_DISTANCES = 1 << 21, 1 << 26


class SoftCodes(NamedTuple):
    """What is kept of a latent beside its code: its `topk` nearest codes, and their weights."""

    topk: int  # k
    temperature: float  # weights are softmax(-squared distance / temperature) of the k


@torch.no_grad()
def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Nearest code of each vector by Euclidean distance, searched in float32: (M, D) -> (M,) int64.

    The first of equally near codes wins.
    """
    return torch.cat(_by_chunk(vectors, codebook, lambda chunk, distances: smallest(distances)))


@torch.no_grad()
def soft_codes(
    vectors: torch.Tensor, codebook: torch.Tensor, soft: SoftCodes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each vector the k nearest codes, nearest_codes first, and their weights.

    (M, D) -> (M, k) int64 and (M, k) float32: get_soft_code's probabilities of these, divided by
    their sum. Computed from the differences themselves, so that a row depends on no other.
    """
    codebook = codebook.float()

    def select(chunk: torch.Tensor, distances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        distances.scatter_(1, smallest(distances)[:, None], -torch.inf)  # first, also of equals
        codes = distances.topk(soft.topk, largest=False).indices  # (rows, k)
        squares = (chunk[:, None] - codebook[codes]).square().sum(-1)
        return codes, torch.softmax(-squares / soft.temperature, dim=1)

    codes, weights = zip(*_by_chunk(vectors, codebook, select), strict=True)
    return torch.cat(codes), torch.cat(weights)


def _by_chunk(
    vectors: torch.Tensor,
    codebook: torch.Tensor,
    select: Callable[[torch.Tensor, torch.Tensor], Any],
) -> list[Any]:
    """select(vectors (rows, D), distances (rows, K)) of as many rows at a time as fit, float32.

    Squared distances without |z|^2, which is the same for every code.
    """
    codebook = codebook.float()
    norms = codebook.square().sum(dim=1)  # (K,)
    limit = _CPU_DISTANCES if vectors.device.type == "cpu" else _GPU_DISTANCES
    rows = max(1, limit // len(codebook))
    with torch.autocast(vectors.device.type, enabled=False):  # bf16 would move 1 to 13 % of codes
        return [
            select(chunk, torch.addmm(norms, chunk, codebook.T, alpha=-2))
            for chunk in vectors.float().split(rows)
        ]


def smallest(distances: torch.Tensor) -> torch.Tensor:
    """Where each row of (M, K) is smallest, first: argmin(dim=1), on a CPU in a tenth of its time.

    NumPy's is vectorised and torch's is not.
    """
    if distances.device.type != "cpu":
        return distances.argmin(dim=1)
    return torch.from_numpy(distances.numpy().argmin(axis=1))


def as_vectors(latents: torch.Tensor) -> torch.Tensor:
    """(B, D, h, w) -> (B*h*w, D), row by row."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


class VectorQuantizer(nn.Module):
    """A codebook of K vectors of D numbers, without normalisation of vectors or codebook."""

    def __init__(self, codebook_size: int, dim: int, commitment_cost: float = 0.25):
        super().__init__()
        self.commitment_cost = commitment_cost
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    @property
    def vectors(self) -> torch.Tensor:
        """The codebook, (K, D)."""
        return self.embedding.weight

    def forward(
        self, latents: torch.Tensor, return_loss: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, D, h, w) -> (quantized (B, D, h, w), codes (B, N)[, loss]).

        With the loss, gradients of the quantized values pass straight through to `latents`.
        """
        codes = nearest_codes(as_vectors(latents), self.vectors).view(len(latents), -1)
        quantized = self.lookup(codes, (latents.shape[2], latents.shape[3])).contiguous()
        if not return_loss:
            return quantized.to(latents.dtype), codes
        loss = self.loss(latents.float(), quantized.float())
        return latents + (quantized - latents).detach().to(latents.dtype), codes, loss

    def loss(self, latents: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """Commitment of the latents to their codes, plus the codebook's pull towards the latents.

        A quirk of the published models that is kept: `commitment_cost` weighs the codebook term.
        """
        commitment = F.mse_loss(latents, quantized.detach())
        codebook = F.mse_loss(quantized, latents.detach())
        return commitment + self.commitment_cost * codebook

    def lookup(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Codes (B, N) of a grid (h, w) -> their vectors (B, D, h, w), in memory channels last.

        A decoder keeps that order, in which convolutions are faster on a CPU.
        """
        vectors = F.embedding(codes, self.vectors)  # (B, N, D)
        return vectors.unflatten(1, grid).permute(0, 3, 1, 2)

    def soft_codes(
        self,
        latents: torch.Tensor,
        temperature: float = 1.0,
        stochastic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, D, h, w) -> (softmax of -squared distance / temperature (B, N, K), codes (B, N)).

        The codes are the nearest ones, or, if `stochastic`, drawn from that softmax.
        """
        vectors, codebook = as_vectors(latents).float(), self.vectors.float()
        with torch.autocast(latents.device.type, enabled=False):
            distances = torch.addmm(codebook.square().sum(dim=1), vectors, codebook.T, alpha=-2)
        soft = torch.softmax(-distances / temperature, dim=1)  # (M, K)
        if stochastic:
            codes = torch.multinomial(soft, 1, generator=generator)
        else:
            codes = distances.argmin(dim=1)
        return soft.view(len(latents), -1, len(codebook)), codes.view(len(latents), -1)
