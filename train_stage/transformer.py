"""MaskGitTransformer: a bidirectional transformer over codes, class- or text-conditional.

Step 7: input_ids (B, T) -> logits (B, T, V). Vocabulary: codes [0, K), then class ids K + c,
padding, and the mask as the last id V - 1. Masking happens outside (masking.py), and so does
sampling (sampling.py). After MaskGIT (Chang et al. 2022) and MUSE (Chang et al. 2023); the
published openMUSE checkpoints load strictly.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from storage.pretrained import PretrainedModel
from train_stage.layers import Norm, TransformerLayer
from train_stage.loss import cross_entropy
from train_stage.sampling import generate

PATCH_POSITIONS = 256  # rows of the position table with use_conv_in_out, whatever the config says


@dataclass
class MaskGitTransformerConfig:
    """Constructor keywords, YAML section model.transformer and config.json in one."""

    vocab_size: int | None = None
    """K + classes + mask; computed and rounded up to a multiple of 64 when not given."""
    hidden_size: int = 768
    """Width D."""
    embedding_size: int | None = None
    """Width of the code embeddings with use_conv_in_out (hidden_size when not given)."""
    num_hidden_layers: int = 12
    """Transformer layers."""
    num_attention_heads: int = 12
    """Heads; must divide hidden_size."""
    intermediate_size: int = 3072
    """Inner width of the feed-forward layers."""
    hidden_dropout: float = 0.1
    """Dropout of embeddings and feed-forward."""
    attention_dropout: float = 0.1
    """Dropout of attention weights."""
    max_position_embeddings: int | None = None
    """Positions; num_vq_tokens (+ 1 for the class), rounded up to 8, when not given."""
    add_cross_attention: bool = False
    """Attend to text states; needed for encoder_hidden_states."""
    encoder_hidden_size: int = 1024
    """Width of the text states."""
    project_encoder_hidden_states: bool = False
    """Project text states to hidden_size and normalise them first."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Norm of attention, output and head (the feed-forward's first norm is always LayerNorm)."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every norm."""
    use_normformer: bool = True
    """Extra norms after attention and inside the feed-forward."""
    use_encoder_layernorm: bool = True
    """A norm after the last layer."""
    use_mlm_layer: bool = True
    """A dense layer + GELU before the logits."""
    use_mlm_layernorm: bool = True
    """A norm inside that head."""
    use_bias: bool = False
    """Biases in linear layers and layer norms."""
    codebook_size: int = 1024
    """K, codes of the VQ model; follows the store when training."""
    num_vq_tokens: int = 256
    """N, codes per image; follows the store when training."""
    num_classes: int | None = None
    """Classes, for class-conditional models; follows the store when training."""
    use_codebook_size_for_output: bool = False
    """Logits for the K codes only, not for the whole vocabulary."""
    use_conv_in_out: bool = False
    """Embed codes on the grid and group them into patches; not for class tokens."""
    patch_size: int = 1
    """Side of a patch of codes with use_conv_in_out."""

    def __post_init__(self) -> None:
        if self.use_conv_in_out and self.num_classes:
            raise ValueError("use_conv_in_out takes no class token; set num_classes to null")
        if self.vocab_size is None:
            self.vocab_size = _round_up(self.codebook_size + (self.num_classes or 0) + 1, 64)
        if self.max_position_embeddings is None:
            self.max_position_embeddings = _round_up(self.num_vq_tokens + bool(self.num_classes), 8)
        least = self.codebook_size + (self.num_classes or 0) + 1
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size {self.vocab_size} is too small for {self.codebook_size} codes, "
                f"{self.num_classes or 0} classes and the mask: at least {least}"
            )


class MaskGitTransformer(PretrainedModel):
    """See the module docstring; keywords: MaskGitTransformerConfig."""

    config_class = MaskGitTransformerConfig

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        c: MaskGitTransformerConfig = self.config
        assert c.vocab_size is not None  # computed in the config's __post_init__
        self.mask_token_id = c.vocab_size - 1
        self.output_size = c.codebook_size if c.use_codebook_size_for_output else c.vocab_size
        self.gradient_checkpointing = False
        norm = (c.norm_type, c.layer_norm_eps, c.use_bias)
        self.embed = ConvEmbed(c) if c.use_conv_in_out else TokenEmbed(c)
        text_width = c.encoder_hidden_size
        if c.project_encoder_hidden_states:  # made even without cross-attention, as published
            self.encoder_proj = nn.Linear(c.encoder_hidden_size, c.hidden_size, bias=c.use_bias)
            self.encoder_proj_layer_norm = Norm(c.hidden_size, *norm)
            text_width = c.hidden_size
        self.transformer_layers = nn.ModuleList(
            TransformerLayer(
                c.hidden_size,
                c.num_attention_heads,
                c.intermediate_size,
                *norm,
                hidden_dropout=c.hidden_dropout,
                attention_dropout=c.attention_dropout,
                normformer=c.use_normformer,
                text_width=text_width if c.add_cross_attention else None,
            )
            for _ in range(c.num_hidden_layers)
        )
        final = c.use_encoder_layernorm
        self.encoder_layer_norm = Norm(c.hidden_size, *norm) if final else nn.Identity()
        if c.use_conv_in_out:
            self.mlm_layer: nn.Module = ConvHead(c, self.output_size)
        elif c.use_mlm_layer:
            self.mlm_layer = DenseHead(c, self.output_size)
        else:
            self.to_logits = nn.Linear(c.hidden_size, self.output_size, bias=c.use_bias)
        self.apply(self._init_weights)

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        cond_dropout_prob: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, output_size); with labels (B, T), -100 = ignored: (logits, mean loss).

        input_ids (B, T) in [0, V); encoder_hidden_states (B, S, encoder_hidden_size);
        encoder_attention_mask (B, S), 1 = attend. cond_dropout_prob zeroes the text of that share
        of samples, in training mode only, by the default generator.
        """
        hidden = self.hidden_states(
            input_ids, encoder_hidden_states, encoder_attention_mask, cond_dropout_prob
        )
        logits = self.logits(hidden)
        if labels is None:
            return logits
        return logits, cross_entropy(logits, labels, label_smoothing)

    def hidden_states(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cond_dropout_prob: float = 0.0,
    ) -> Tensor:
        """What the head reads: (B, T, D), or (B, T / patch_size², D) with use_conv_in_out."""
        text = self._text(encoder_hidden_states, cond_dropout_prob)
        x = self.embed(input_ids)
        for layer in self.transformer_layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, text, encoder_attention_mask, use_reentrant=False)
            else:
                x = layer(x, text, encoder_attention_mask)
        return self.encoder_layer_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: (..., D) -> (..., output_size)."""
        return self.mlm_layer(hidden) if hasattr(self, "mlm_layer") else self.to_logits(hidden)

    def generate(self, **arguments: Any) -> Tensor:
        """Codes (B, N) by parallel decoding; takes what train_stage.sampling.generate takes."""
        return generate(self, **arguments)

    def config_dict(self) -> dict[str, Any]:
        return dict(sorted((super().config_dict() | {"mask_token_id": self.mask_token_id}).items()))

    def _text(self, text: Tensor | None, dropout: float) -> Tensor | None:
        if not self.config.add_cross_attention:
            return None
        if text is None:
            raise ValueError("add_cross_attention is set: give encoder_hidden_states (B, S, width)")
        if self.config.project_encoder_hidden_states:
            text = self.encoder_proj_layer_norm(self.encoder_proj(text))
        if self.training and dropout > 0.0:
            keep = torch.rand(len(text), 1, 1, device=text.device) < 1.0 - dropout
            text = text * keep
        return text

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class TokenEmbed(nn.Module):
    """Code (or class) embedding plus position embedding."""

    def __init__(self, c: MaskGitTransformerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)  # type: ignore[arg-type]
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(c.hidden_dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        length, table = input_ids.shape[-1], self.position_embeddings.weight
        if length > len(table):
            raise ValueError(f"{length} positions, max_position_embeddings is {len(table)}")
        return self.dropout(self.word_embeddings(input_ids) + table[:length])  # (B, T, D)


class ConvEmbed(nn.Module):
    """Codes embedded on their square grid, grouped into patches, projected by a 1x1 convolution."""

    def __init__(self, c: MaskGitTransformerConfig):
        super().__init__()
        width = c.embedding_size or c.hidden_size
        self.patch_size = c.patch_size
        self.embeddings = nn.Embedding(c.vocab_size, width)  # type: ignore[arg-type]
        self.layer_norm = Norm(width, c.norm_type, c.layer_norm_eps, c.use_bias)
        self.conv = nn.Conv2d(width * c.patch_size**2, c.hidden_size, 1, bias=c.use_bias)
        self.position_embeddings = nn.Embedding(PATCH_POSITIONS, c.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        side = math.isqrt(input_ids.shape[-1])
        x = self.layer_norm(self.embeddings(input_ids))  # (B, N, E)
        x = x.transpose(1, 2).unflatten(-1, (side, side))  # (B, E, side, side)
        x = self.conv(F.pixel_unshuffle(x, self.patch_size)).flatten(2).transpose(1, 2)
        return x + self.position_embeddings.weight[: x.shape[1]]  # (B, N / patch², D)


class DenseHead(nn.Module):
    """Linear, GELU, norm, linear to the logits."""

    def __init__(self, c: MaskGitTransformerConfig, output_size: int):
        super().__init__()
        self.mlm_dense = nn.Linear(c.hidden_size, c.hidden_size, bias=c.use_bias)
        norm = Norm(c.hidden_size, c.norm_type, c.layer_norm_eps, c.use_bias)
        self.mlm_ln = norm if c.use_mlm_layernorm else nn.Identity()
        self.to_logits = nn.Linear(c.hidden_size, output_size, bias=c.use_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.to_logits(self.mlm_ln(F.gelu(self.mlm_dense(hidden))))


class ConvHead(nn.Module):
    """The way back from patches to one vector of logits a code."""

    def __init__(self, c: MaskGitTransformerConfig, output_size: int):
        super().__init__()
        width = c.embedding_size or c.hidden_size
        self.patch_size = c.patch_size
        self.conv1 = nn.Conv2d(c.hidden_size, width * c.patch_size**2, 1, bias=c.use_bias)
        norm = Norm(width, c.norm_type, c.layer_norm_eps, c.use_bias)
        self.layer_norm = nn.ModuleDict({"norm": norm})
        self.conv2 = nn.Conv2d(width, output_size, 1, bias=c.use_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        side = math.isqrt(hidden.shape[1])
        x = self.conv1(hidden.transpose(1, 2).unflatten(-1, (side, side)))
        x = F.pixel_shuffle(x, self.patch_size)  # (B, E, h, w)
        x = self.layer_norm["norm"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.conv2(x).flatten(2).transpose(1, 2)  # (B, N, output_size)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
