"""MaskGitTransformer: a bidirectional transformer over codes, class- or text-conditional.

Step 7: input_ids (B, T) -> logits (B, T, V). Vocabulary: codes [0, K), then class ids K + c,
padding, and the mask as the last id V - 1. Masking happens outside (masking.py), and so does
sampling (sampling.py). After MaskGIT (Chang et al. 2022) and MUSE (Chang et al. 2023); the
published openMUSE checkpoints load strictly.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_stage.models.attention import mask_bias
from train_stage.models.extensions import embed_codes, previous_mapping
from train_stage.models.layers import LayerContext, NormStyle, TransformerLayer
from train_stage.models.model_fields import MaskGitTransformerConfig
from train_stage.models.token_transformer import TokenTransformer

PATCH_POSITIONS = 256  # rows of the position table with use_conv_in_out, whatever the config says
Context = tuple[Tensor | None, tuple[LayerContext, ...]]  # bias of the text mask; each layer's


class MaskGitTransformer(TokenTransformer):
    """See the module docstring; keywords: MaskGitTransformerConfig."""

    config_class = MaskGitTransformerConfig

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        c: MaskGitTransformerConfig = self.config
        assert c.vocab_size is not None  # computed in the config's __post_init__
        self.output_size = c.codebook_size if c.use_codebook_size_for_output else c.vocab_size
        style = NormStyle(c.norm_type, c.layer_norm_eps, c.use_bias)
        self.embed = ConvEmbed(c, style) if c.use_conv_in_out else TokenEmbed(c)
        text_width = c.encoder_hidden_size
        if c.project_encoder_hidden_states:  # made even without cross-attention, as published
            self.encoder_proj = nn.Linear(c.encoder_hidden_size, c.hidden_size, bias=c.use_bias)
            self.encoder_proj_layer_norm = style.norm(c.hidden_size)
            text_width = c.hidden_size
        self.transformer_layers: Any = nn.ModuleList(
            TransformerLayer(
                c.hidden_size,
                c.num_attention_heads,
                c.intermediate_size,
                style,
                c.use_bias,
                c.hidden_dropout,
                c.attention_dropout,
                c.use_normformer,
                text_width if c.add_cross_attention else None,
            )
            for _ in range(c.num_hidden_layers)
        )
        final = c.use_encoder_layernorm
        self.encoder_layer_norm = style.norm(c.hidden_size) if final else nn.Identity()
        if c.use_conv_in_out:
            self.mlm_layer: Any = ConvHead(c, style, self.output_size)
        elif c.use_mlm_layer:
            self.mlm_layer = DenseHead(c, style, self.output_size)
        else:
            self.to_logits = nn.Linear(c.hidden_size, self.output_size, bias=c.use_bias)
        self.apply(self._init_weights)
        embedding_size = c.embedding_size if c.use_conv_in_out else None
        self.add_extensions(embedding_size or c.hidden_size, c.encoder_hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        cond_dropout_prob: float = 0.0,
        loss_weight: Tensor | None = None,
        dropped: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, output_size); with labels (B, T), -100 = ignored: (logits, mean loss).

        input_ids (B, T) in [0, V); encoder_hidden_states (B, S, encoder_hidden_size);
        encoder_attention_mask (B, S), 1 = attend. cond_dropout_prob zeroes the text of that share
        of samples, in training mode only, by the default generator. loss_weight: see token_loss.
        dropped, previous: see hidden_states.
        """
        hidden = self.hidden_states(
            input_ids,
            encoder_hidden_states,
            encoder_attention_mask,
            cond_dropout_prob,
            dropped=dropped,
            previous=previous,
        )
        return self.logits_and_loss(hidden, labels, label_smoothing, loss_weight)

    def context(
        self,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Context:
        """What depends on the text alone: the mask's bias, keys and values for every layer."""
        text, bias = self._text(encoder_hidden_states, encoder_attention_mask, dropped)
        return bias, tuple(layer.context(text, None) for layer in self.transformer_layers)

    def hidden_states(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cond_dropout_prob: float = 0.0,
        context: Context | None = None,
        dropped: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, (B, T, E); given a context, the text is not needed.

        dropped (B,) bool: rows that get the learned null text (null_text_length). previous (B, T):
        an earlier prediction of the codes (self_conditioning), the mask id where there is none, as
        at the class token.
        """
        x = self.embed(input_ids, previous)
        if context is None:
            text, bias = self._text(
                encoder_hidden_states, encoder_attention_mask, dropped, cond_dropout_prob
            )
            for layer in self.transformer_layers:
                x = self.run(layer, x, text, None, bias)
        else:
            for layer, known in zip(self.transformer_layers, context[1], strict=True):
                x = self.run(layer, x, None, None, context[0], known)
        x = self.encoder_layer_norm(x)  # (B, T, D), fewer positions if codes are in patches
        return self.mlm_layer.ungroup(x) if self.config.use_conv_in_out else x

    def head(self, hidden: Tensor) -> Tensor:
        return self.mlm_layer(hidden) if hasattr(self, "mlm_layer") else hidden

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        if self.config.use_conv_in_out:
            return self.mlm_layer.conv2.weight.flatten(1), self.mlm_layer.conv2.bias
        linear = self.mlm_layer if hasattr(self, "mlm_layer") else self
        return linear.to_logits.weight, linear.to_logits.bias

    def layers(self) -> list[nn.Module]:
        return list(self.transformer_layers)

    def _text(
        self,
        text: Tensor | None,
        mask: Tensor | None,
        dropped: Tensor | None,
        dropout: float = 0.0,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Text states as the layers read them, and the bias of their mask."""
        if not self.config.add_cross_attention:
            return None, None
        if text is None:
            raise ValueError("add_cross_attention is set: give encoder_hidden_states (B, S, width)")
        text, mask, _ = self.with_null(text, mask, None, dropped)
        if self.config.project_encoder_hidden_states:
            text = self.encoder_proj_layer_norm(self.encoder_proj(text))
        if self.training and dropout > 0.0:
            keep = torch.rand(len(text), 1, 1, device=text.device) < 1.0 - dropout
            text = text * keep
        return text, mask_bias(mask, text.dtype)

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
        self.previous = previous_mapping(c.hidden_size, c.self_conditioning)
        self.dropout = nn.Dropout(c.hidden_dropout)

    def forward(self, input_ids: Tensor, previous: Tensor | None = None) -> Tensor:
        length, table = input_ids.shape[-1], self.position_embeddings.weight
        if length > len(table):
            raise ValueError(f"{length} positions, max_position_embeddings is {len(table)}")
        x = embed_codes(self.word_embeddings, self.previous, input_ids, previous)
        return self.dropout(x + table[:length])  # (B, T, D)


class ConvEmbed(nn.Module):
    """Codes embedded on their square grid, grouped into patches, projected by a 1x1 convolution."""

    def __init__(self, c: MaskGitTransformerConfig, style: NormStyle):
        super().__init__()
        width = c.embedding_size or c.hidden_size
        self.patch_size = c.patch_size
        self.embeddings = nn.Embedding(c.vocab_size, width)  # type: ignore[arg-type]
        self.previous = previous_mapping(width, c.self_conditioning)
        self.layer_norm = style.norm(width)
        self.conv = nn.Conv2d(width * c.patch_size**2, c.hidden_size, 1, bias=c.use_bias)
        self.position_embeddings = nn.Embedding(PATCH_POSITIONS, c.hidden_size)

    def forward(self, input_ids: Tensor, previous: Tensor | None = None) -> Tensor:
        side = math.isqrt(input_ids.shape[-1])
        x = embed_codes(self.embeddings, self.previous, input_ids, previous)
        x = self.layer_norm(x)  # (B, N, E)
        x = x.transpose(1, 2).unflatten(-1, (side, side))  # (B, E, side, side)
        x = self.conv(F.pixel_unshuffle(x, self.patch_size)).flatten(2).transpose(1, 2)
        return x + self.position_embeddings.weight[: x.shape[1]]  # (B, N / patch², D)


class DenseHead(nn.Module):
    """Linear, GELU and norm, then (see output_layer) linear to the logits."""

    def __init__(self, c: MaskGitTransformerConfig, style: NormStyle, output_size: int):
        super().__init__()
        self.mlm_dense = nn.Linear(c.hidden_size, c.hidden_size, bias=c.use_bias)
        self.mlm_ln = style.norm(c.hidden_size) if c.use_mlm_layernorm else nn.Identity()
        self.to_logits = nn.Linear(c.hidden_size, output_size, bias=c.use_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlm_ln(F.gelu(self.mlm_dense(hidden)))


class ConvHead(nn.Module):
    """From patches back to codes (ungroup), norm, then (see output_layer) a 1x1 convolution."""

    def __init__(self, c: MaskGitTransformerConfig, style: NormStyle, output_size: int):
        super().__init__()
        width = c.embedding_size or c.hidden_size
        self.patch_size = c.patch_size
        self.conv1 = nn.Conv2d(c.hidden_size, width * c.patch_size**2, 1, bias=c.use_bias)
        self.layer_norm = nn.ModuleDict({"norm": style.norm(width)})
        self.conv2 = nn.Conv2d(width, output_size, 1, bias=c.use_bias)

    def ungroup(self, hidden: Tensor) -> Tensor:
        """(B, N / patch², D) -> (B, N, E)."""
        side = math.isqrt(hidden.shape[1])
        x = self.conv1(hidden.transpose(1, 2).unflatten(-1, (side, side)))
        return F.pixel_shuffle(x, self.patch_size).flatten(2).transpose(1, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer_norm["norm"](hidden)
