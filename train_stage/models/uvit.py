"""MaskGiTUViT: a transformer over codes with residual convolutions before and after (step 7).

Conditioned on text states, a pooled text vector and micro-conditions (original size, crop,
aesthetic score); without position embeddings, as the convolutions tell where a code is. The
published second version: openMUSE's muse-256 and muse-512, aMUSEd 256 and 512 (Patil et al. 2024,
after Hoogeboom et al. 2023). Vocabulary: codes [0, K), padding, the mask as the last id.

B batch, N = h*w codes, h x w grid, C channels of the convolutions, D width of the transformer,
S text positions, m micro-conditions.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from train_stage.models.attention import mask_bias
from train_stage.models.extensions import embed_codes, previous_mapping
from train_stage.models.layers import NormStyle, TransformerLayer
from train_stage.models.model_fields import MaskGiTUViTConfig
from train_stage.models.token_transformer import TokenTransformer
from train_stage.models.uvit_blocks import ResBlock, Stage, TextAttention, to_features, to_images

Context = tuple[Tensor | None, tuple[Any, ...]]  # bias of the text mask; each block's context


class MaskGiTUViT(TokenTransformer):
    """See the module docstring; keywords: MaskGiTUViTConfig."""

    config_class = MaskGiTUViTConfig
    class_name = "MaskGiTUViT_v2"

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        c: MaskGiTUViTConfig = self.config
        self.output_size = c.codebook_size
        style = NormStyle(c.norm_type, c.layer_norm_eps, c.use_bias, c.ln_elementwise_affine)
        width, channels, bias = c.hidden_size, c.block_out_channels[0], c.use_bias
        self.encoder_proj = nn.Linear(c.encoder_hidden_size, width, bias=bias)
        self.encoder_proj_layer_norm = style.norm(width)
        self.embed = UViTEmbed(c, style)
        self.cond_embed = nn.Sequential(
            nn.Linear(c.cond_embed_dim + c.micro_cond_embed_dim, width, bias=bias),
            nn.SiLU(),
            nn.Linear(width, width, bias=bias),
        )
        self.down_blocks = nn.ModuleList([self._stage(style, "down")])
        self.project_to_hidden_norm = style.norm(channels)
        self.project_to_hidden = nn.Linear(channels, width, bias=bias)
        self.transformer_layers = nn.ModuleList(
            TransformerLayer(
                width,
                c.num_attention_heads,
                c.intermediate_size,
                style,
                bias,
                c.hidden_dropout,
                c.attention_dropout,
                text_width=width,
                cond_width=width,
                gated=not c.use_fused_mlp,
            )
            for _ in range(c.num_hidden_layers)
        )
        self.project_from_hidden_norm = style.norm(width)
        self.project_from_hidden = nn.Linear(width, channels, bias=bias)
        self.up_blocks = nn.ModuleList([self._stage(style, "up")])
        self.mlm_layer = UViTHead(c, style)
        self._init_weights()
        self.add_extensions(channels, c.encoder_hidden_size, c.cond_embed_dim)

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        cond_embeds: Tensor,
        micro_conds: Tensor,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        loss_weight: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        dropped: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, N, K); with labels (B, N), -100 = ignored: (logits, mean loss).

        input_ids (B, N) in [0, V), row by row of a grid (h, w), square when not given;
        encoder_hidden_states (B, S, encoder_hidden_size); cond_embeds (B, cond_embed_dim);
        micro_conds (B, m): width, height, crop top, crop left, aesthetic score;
        encoder_attention_mask (B, S), 1 = attend. loss_weight: see token_loss. dropped, previous:
        see hidden_states.
        """
        hidden = self.hidden_states(
            input_ids,
            encoder_hidden_states,
            cond_embeds,
            micro_conds,
            encoder_attention_mask,
            grid=grid,
            dropped=dropped,
            previous=previous,
        )
        return self.logits_and_loss(hidden, labels, label_smoothing, loss_weight)

    def context(
        self,
        encoder_hidden_states: Tensor,
        cond_embeds: Tensor,
        micro_conds: Tensor,
        encoder_attention_mask: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Context:
        """What depends on the condition alone: keys and values of the text, scales and shifts."""
        text, cond, bias = self._condition(
            encoder_hidden_states, cond_embeds, micro_conds, encoder_attention_mask, dropped
        )
        blocks: list[Any] = self.layers()
        return bias, tuple(block.context(text, cond) for block in blocks)

    def hidden_states(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        cond_embeds: Tensor | None = None,
        micro_conds: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        context: Context | None = None,
        grid: tuple[int, int] | None = None,
        dropped: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, (B, N, C); given a context, the condition is not needed.

        dropped (B,) bool: rows that get the learned null texts (null_text_length). previous (B, N):
        an earlier prediction of the codes (self_conditioning), the mask id where there is none.
        """
        down: Any = self.down_blocks[0]
        up: Any = self.up_blocks[0]
        text = cond = None
        if context is None:
            text, cond, bias = self._condition(
                encoder_hidden_states, cond_embeds, micro_conds, encoder_attention_mask, dropped
            )
            contexts: tuple[Any, ...] = (None,) * len(self.layers())
        else:
            bias, contexts = context
        known = iter(contexts)
        x = down.resampled(self.embed(input_ids, grid, previous), "downsample")  # (B, h, w, C)
        for block in down.blocks():
            x = self.run(block, x, text, cond, bias, next(known))
        size = x.shape[1:3]
        tokens = self.project_to_hidden(self.project_to_hidden_norm(x.flatten(1, 2)))  # (B, n, D)
        for layer in self.transformer_layers:
            tokens = self.run(layer, tokens, text, cond, bias, next(known))
        tokens = self.project_from_hidden(self.project_from_hidden_norm(tokens))
        x = tokens.unflatten(1, size)
        for block in up.blocks():
            x = self.run(block, x, text, cond, bias, next(known))
        return up.resampled(x, "upsample").flatten(1, 2)

    def head(self, hidden: Tensor) -> Tensor:
        return self.mlm_layer(hidden)

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        return self.mlm_layer.conv2.weight.flatten(1), self.mlm_layer.conv2.bias

    def layers(self) -> list[nn.Module]:
        """Every block with a context, in the order in which they run."""
        down: Any = self.down_blocks[0]
        up: Any = self.up_blocks[0]
        return [*down.blocks(), *self.transformer_layers, *up.blocks()]

    def _stage(self, style: NormStyle, resample: str) -> Stage:
        c: MaskGiTUViTConfig = self.config
        channels, width, bias = c.block_out_channels[0], c.hidden_size, c.use_bias
        pairs = [
            (
                ResBlock(channels, style, bias, c.hidden_dropout, width),
                TextAttention(channels, c.block_num_heads, width, style, bias, c.attention_dropout),
            )
            for _ in range(c.num_res_blocks)
        ]
        return Stage(pairs, channels, style, bias, resample if c.force_down_up_sample else None)

    def _condition(
        self,
        text: Tensor | None,
        pooled: Tensor | None,
        micro_conds: Tensor | None,
        mask: Tensor | None,
        dropped: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Text (B, S, D), condition vector (B, D) and the bias of the text's mask."""
        if text is None or pooled is None or micro_conds is None:
            raise ValueError(
                "give encoder_hidden_states, cond_embeds and micro_conds, or a context"
            )
        text, mask, pooled = self.with_null(text, mask, pooled, dropped)
        text = self.encoder_proj_layer_norm(self.encoder_proj(text))
        micro = sinusoidal_encode(micro_conds, self.config.micro_cond_encode_dim).flatten(1)
        if micro.shape[1] != self.config.micro_cond_embed_dim:
            wanted = self.config.micro_cond_embed_dim // self.config.micro_cond_encode_dim
            raise ValueError(f"{micro_conds.shape[1]} micro-conditions, the model takes {wanted}")
        cond = self.cond_embed(torch.cat([pooled, micro.to(pooled.dtype)], dim=1))
        return text, cond, mask_bias(mask, text.dtype)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.embed.conv.weight, gain=0.02)
        embeddings = self.embed.embeddings.weight
        nn.init.normal_(embeddings, std=self.config.vocab_size**-0.5)
        nn.init.zeros_(self.mlm_layer.conv1.weight)
        with torch.no_grad():  # the logits start as inner products with the embeddings
            codes = embeddings[: self.config.codebook_size, :, None, None]
            self.mlm_layer.conv2.weight.copy_(codes)
        for block in self.layers():
            for name, parameter in block.named_parameters():
                if name.endswith("adaLN_modulation.mapper.weight"):
                    nn.init.zeros_(parameter)


class UViTEmbed(nn.Module):
    """Codes -> features on their grid: embedding, norm, 1x1 convolution."""

    def __init__(self, c: MaskGiTUViTConfig, style: NormStyle):
        super().__init__()
        self.embeddings = nn.Embedding(c.vocab_size, c.in_channels)
        self.previous = previous_mapping(c.in_channels, c.self_conditioning)
        self.layer_norm = style.norm(c.in_channels)
        self.conv = nn.Conv2d(c.in_channels, c.block_out_channels[0], 1, bias=c.use_bias)

    def forward(
        self,
        input_ids: Tensor,
        grid: tuple[int, int] | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """input_ids, previous (B, N) -> (B, h, w, C)."""
        count = input_ids.shape[1]
        grid = grid or (math.isqrt(count), math.isqrt(count))
        if grid[0] * grid[1] != count:
            raise ValueError(
                f"{count} codes do not fill a grid of {grid[0]} x {grid[1]}: give grid"
            )
        x = embed_codes(self.embeddings, self.previous, input_ids, previous)
        x = self.layer_norm(x).unflatten(1, grid)
        return to_features(self.conv(to_images(x)))


class UViTHead(nn.Module):
    """1x1 convolution and norm, then (see output_layer) a 1x1 convolution to the logits."""

    def __init__(self, c: MaskGiTUViTConfig, style: NormStyle):
        super().__init__()
        self.conv1 = nn.Conv2d(c.block_out_channels[0], c.in_channels, 1, bias=c.use_bias)
        self.layer_norm = nn.ModuleDict({"norm": style.norm(c.in_channels)})
        self.conv2 = nn.Conv2d(c.in_channels, c.codebook_size, 1, bias=c.use_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., in_channels), pointwise."""
        x = nn.functional.linear(hidden, self.conv1.weight.flatten(1), self.conv1.bias)
        return self.layer_norm["norm"](x)


def sinusoidal_encode(values: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of every value: (...,) -> (..., width) float32 (Vaswani et al. 2017).

    Wavelengths are 2π 10000^(k / (width // 2)); an odd width ends with a zero.
    """
    half = width // 2
    exponents = torch.arange(half, device=values.device, dtype=torch.float32) / half
    angles = values.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponents)
    encoded = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(encoded, (0, width - 2 * half))
