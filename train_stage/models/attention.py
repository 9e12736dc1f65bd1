"""Scaled dot-product attention (Vaswani et al. 2017, equation 1), by one of three backends.

They compute the same function. Shapes: B batch, T queries, S keys, H heads, d head width.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionBackend = Literal["sdpa", "xformers", "plain"]
XFORMERS_ALIGNMENT = 8  # its kernels read the bias in groups of so many keys


def check_backend(name: str) -> None:
    """Raises ValueError for a backend that there is not, or not here."""
    if name not in get_args(AttentionBackend):
        raise ValueError(f"attention={name!r}: legal are {', '.join(get_args(AttentionBackend))}")
    if name == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError:
            raise ValueError(
                "attention=xformers, but xformers is missing: pip install 'open-muse[xformers]', "
                "or take attention=sdpa"
            ) from None
        if not torch.cuda.is_available():
            raise ValueError("attention=xformers needs a CUDA GPU; on a CPU take attention=sdpa")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: AttentionBackend = "sdpa",
) -> Tensor:
    """q (B, T, H, d), k and v (B, S, H, d), bias (B, 1, 1, S) added to the scores -> (B, T, H, d).

    dropout is the probability of dropping an attention weight. "sdpa" is PyTorch's (flash or
    memory-efficient kernels where they apply), "xformers" needs a GPU, "plain" spells the equation.
    """
    if backend == "sdpa":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T or S, d)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return mixed.transpose(1, 2)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        wide = None if bias is None else _aligned(bias, q)
        return memory_efficient_attention(q, k, v, attn_bias=wide, p=dropout)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    weights = (scores if bias is None else scores + bias).softmax(-1)  # (B, H, T, S)
    return torch.einsum("bhts,bshd->bthd", F.dropout(weights, dropout), v)


def mask_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask (B, S), 1 = attend, as what is added to the scores: (B, 1, 1, S) of 0 and the lowest.

    The lowest number, not -inf: a text of which nothing may be attended then gives no NaN.
    """
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask.bool(), torch.finfo(dtype).min)[:, None, None, :]


def _aligned(bias: Tensor, q: Tensor) -> Tensor:
    """The bias for every head and query, in rows padded to what xformers wants."""
    keys = bias.shape[-1]
    padded = F.pad(bias, (0, -keys % XFORMERS_ALIGNMENT)).to(q.dtype)
    return padded.expand(-1, q.shape[2], q.shape[1], -1).contiguous()[..., :keys]
