"""Layers of the transformers: norm, attention, gated feed-forward, one pre-norm block.

Parameter names are those of the published checkpoints. B batch, T positions, D width, S text
positions, H heads, d head width.

What depends on the condition alone (keys and values of the text, scales and shifts) is a layer's
context: training computes it in the layer, sampling once for all decoding steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_stage.models.attention import AttentionBackend, attend


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis; a bias only for LayerNorm."""

    def __init__(self, width: int, kind: str, eps: float, bias: bool, affine: bool):
        super().__init__()
        if kind not in ("layernorm", "rmsnorm"):
            raise ValueError(f"norm_type {kind!r}: legal are layernorm, rmsnorm")
        self.width, self.kind, self.eps = (width,), kind, eps
        has_bias = affine and bias and kind == "layernorm"
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layernorm":
            return F.layer_norm(x, self.width, self.weight, self.bias, self.eps)
        # squares are averaged in float32 whatever x is; autocast leaves float32 weights as they are
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.width, weight, self.eps)


class NormStyle(NamedTuple):
    """How a model normalises; makes its norms."""

    kind: str
    eps: float
    bias: bool = False
    affine: bool = True

    def norm(self, width: int) -> Norm:
        """A norm over `width` channels, the last axis."""
        return Norm(width, *self)

    def layer_norm(self, width: int) -> Norm:
        """The same but always a LayerNorm."""
        return Norm(width, "layernorm", *self[1:])


class Attention(nn.Module):
    """Multi-head attention without causal mask: self-attention, or to the text of a context."""

    backend: AttentionBackend = "sdpa"

    def __init__(self, width: int, heads: int, context_width: int, bias: bool, dropout: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} attention heads")
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(context_width, width, bias=bias)
        self.value = nn.Linear(context_width, width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def context(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, H, d) of what is attended to, (B, S, context_width)."""
        return self._heads(self.key(text)), self._heads(self.value(text))

    def forward(
        self, x: Tensor, context: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x (B, T, D) to itself, or to a context; bias (B, 1, 1, S) -> (B, T, D)."""
        keys, values = self.context(x) if context is None else context
        dropout = self.dropout if self.training else 0.0
        query = self._heads(self.query(x))
        return self.out(attend(query, keys, values, bias, dropout, self.backend).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # (B, T or S, H, d)


class AdaLN(nn.Module):
    """Scale and shift from a condition vector (Peebles & Xie 2023); starts as the identity."""

    def __init__(self, width: int, cond_width: int, bias: bool):
        super().__init__()
        self.mapper = nn.Linear(cond_width, 2 * width, bias=bias)

    def context(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        """cond (B, cond_width) -> 1 + scale and shift, (B, 1, D) each."""
        scale, shift = self.mapper(F.silu(cond)).unsqueeze(1).chunk(2, dim=-1)
        return 1.0 + scale, shift


def modulate(x: Tensor, context: tuple[Tensor, Tensor] | None) -> Tensor:
    """x (B, T, D) scaled and shifted by AdaLN's context, as it is without one."""
    return x if context is None else x * context[0] + context[1]


class FeedForward(nn.Module):
    """GELU-gated feed-forward; without the gate a tanh-GELU one.

    Its first norm is a LayerNorm even in an RMSNorm model, as in the published checkpoints.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        style: NormStyle,
        bias: bool,
        dropout: float,
        normformer: bool,
        cond_width: int | None,
        gated: bool,
    ):
        super().__init__()
        self.pre_mlp_layer_norm = style.layer_norm(width)
        if cond_width is not None:
            self.adaLN_modulation = AdaLN(width, cond_width, bias)
        self.wi_0 = nn.Linear(width, inner, bias=bias)
        self.wi_1 = nn.Linear(width, inner, bias=bias) if gated else None
        self.mid_mlp_layer_norm = style.norm(inner) if normformer else None
        self.dropout = nn.Dropout(dropout)
        self.wo = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = modulate(self.pre_mlp_layer_norm(x), scale_shift)
        if self.wi_1 is None:
            x = F.gelu(self.wi_0(x), approximate="tanh")
        else:
            x = F.gelu(self.wi_0(x)) * self.wi_1(x)  # (B, T, inner)
        if self.mid_mlp_layer_norm is not None:
            x = self.mid_mlp_layer_norm(x)
        return self.wo(self.dropout(x))


class LayerContext(NamedTuple):
    """What a TransformerLayer needs to know of the condition."""

    text: tuple[Tensor, Tensor] | None = None  # keys and values (B, S, H, d)
    attention: tuple[Tensor, Tensor] | None = None  # scale and shift (B, 1, D) before attention
    crossattention: tuple[Tensor, Tensor] | None = None
    ffn: tuple[Tensor, Tensor] | None = None


class TransformerLayer(nn.Module):
    """Pre-norm block: self-attention, optional cross-attention to text, feed-forward.

    With `normformer` the attention outputs are normalised too (Shleifer et al. 2021); with
    `cond_width` a condition vector scales and shifts what each of the three reads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        style: NormStyle,
        bias: bool,
        hidden_dropout: float,
        attention_dropout: float,
        normformer: bool = False,
        text_width: int | None = None,
        cond_width: int | None = None,
        gated: bool = True,
    ):
        super().__init__()
        self.attn_layer_norm = style.norm(width)
        self.attention = Attention(width, heads, width, bias, attention_dropout)
        self.post_attn_layer_norm = style.norm(width) if normformer else nn.Identity()
        if text_width is not None:
            self.crossattn_layer_norm = style.norm(width)
            self.crossattention = Attention(width, heads, text_width, bias, attention_dropout)
            self.post_crossattn_layer_norm = style.norm(width) if normformer else nn.Identity()
        if cond_width is not None:
            self.self_attn_adaLN_modulation = AdaLN(width, cond_width, bias)
            self.cross_attn_adaLN_modulation = AdaLN(width, cond_width, bias)
        self.ffn = FeedForward(
            width, inner, style, bias, hidden_dropout, normformer, cond_width, gated
        )

    def context(self, text: Tensor | None, cond: Tensor | None) -> LayerContext:
        """From text (B, S, text_width) and cond (B, cond_width), where the layer has them."""
        keys_values = None if text is None else self.crossattention.context(text)
        if cond is None:
            return LayerContext(keys_values)
        return LayerContext(
            keys_values,
            self.self_attn_adaLN_modulation.context(cond),
            self.cross_attn_adaLN_modulation.context(cond),
            self.ffn.adaLN_modulation.context(cond),
        )

    def forward(
        self,
        x: Tensor,
        text: Tensor | None = None,
        cond: Tensor | None = None,
        bias: Tensor | None = None,
        context: LayerContext | None = None,
    ) -> Tensor:
        """x (B, T, D), bias (B, 1, 1, S) on the text -> (B, T, D); the context when it is known."""
        context = self.context(text, cond) if context is None else context
        h = modulate(self.attn_layer_norm(x), context.attention)
        x = x + self.post_attn_layer_norm(self.attention(h))
        if context.text is not None:
            h = modulate(self.crossattn_layer_norm(x), context.crossattention)
            x = x + self.post_crossattn_layer_norm(self.crossattention(h, context.text, bias))
        return x + self.ffn(x, context.ffn)
