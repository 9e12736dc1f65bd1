"""Layers of the transformers: norm, attention, gated feed-forward, one pre-norm block.

Parameter names are those of the published checkpoints. B batch, T positions, D width, S text
positions, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, with a weight; a bias only for LayerNorm."""

    def __init__(self, width: int, kind: str, eps: float, bias: bool = False):
        super().__init__()
        if kind not in ("layernorm", "rmsnorm"):
            raise ValueError(f"norm_type {kind!r}: legal are layernorm, rmsnorm")
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias and kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layernorm":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        # the mean of squares in float32 whatever the dtype of x
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x * scale).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Multi-head attention without causal mask: self-attention, or to a text when one is given."""

    def __init__(self, width: int, heads: int, context_width: int, bias: bool, dropout: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"hidden_size {width} is not divisible by {heads} attention heads")
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(context_width, width, bias=bias)
        self.value = nn.Linear(context_width, width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, T, D), context (B, S, context_width), mask (B, S): 1 = attend -> (B, T, D)."""
        context = x if context is None else context
        q, k, v = (
            projection.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T or S, D/H)
            for projection in (self.query(x), self.key(context), self.value(context))
        )
        allowed = None if mask is None else mask.bool()[:, None, None, :]  # (B, 1, 1, S)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GELU-gated feed-forward. Its first norm is a LayerNorm even in an RMSNorm model (SPEC 6)."""

    def __init__(
        self,
        width: int,
        inner: int,
        norm: str,
        eps: float,
        bias: bool,
        dropout: float,
        normformer: bool,
    ):
        super().__init__()
        self.pre_mlp_layer_norm = Norm(width, "layernorm", eps, bias)
        self.wi_0 = nn.Linear(width, inner, bias=bias)
        self.wi_1 = nn.Linear(width, inner, bias=bias)
        self.mid_mlp_layer_norm = Norm(inner, norm, eps, bias) if normformer else None
        self.dropout = nn.Dropout(dropout)
        self.wo = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_mlp_layer_norm(x)
        x = F.gelu(self.wi_0(x)) * self.wi_1(x)  # (B, T, inner)
        if self.mid_mlp_layer_norm is not None:
            x = self.mid_mlp_layer_norm(x)
        return self.wo(self.dropout(x))


class TransformerLayer(nn.Module):
    """Pre-norm block: self-attention, optional cross-attention to text, feed-forward.

    With `normformer` the attention outputs are normalised too (Shleifer et al. 2021).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        norm: str,
        eps: float,
        bias: bool,
        hidden_dropout: float,
        attention_dropout: float,
        normformer: bool,
        text_width: int | None,
    ):
        super().__init__()
        self.attn_layer_norm = Norm(width, norm, eps, bias)
        self.attention = Attention(width, heads, width, bias, attention_dropout)
        self.post_attn_layer_norm = Norm(width, norm, eps, bias) if normformer else nn.Identity()
        if text_width is not None:
            self.crossattn_layer_norm = Norm(width, norm, eps, bias)
            self.crossattention = Attention(width, heads, text_width, bias, attention_dropout)
            self.post_crossattn_layer_norm = (
                Norm(width, norm, eps, bias) if normformer else nn.Identity()
            )
        self.ffn = FeedForward(width, inner, norm, eps, bias, hidden_dropout, normformer)

    def forward(self, x: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.post_attn_layer_norm(self.attention(self.attn_layer_norm(x)))
        if text is not None:
            attended = self.crossattention(self.crossattn_layer_norm(x), text, mask)
            x = x + self.post_crossattn_layer_norm(attended)
        return x + self.ffn(x)  # (B, T, D)
