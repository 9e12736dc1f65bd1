"""The keywords of both models (step 7): constructor, YAML section model.transformer, config.json.

K codes, D width of the transformer, C channels of convolutions.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ExtensionFields:
    """Fields that the configurations of both models have."""

    self_conditioning: bool = False
    """Beside the codes read an earlier prediction of them (Bit Diffusion, Chen et al. 2022)."""
    critic_head: bool = False
    """A second head tells the image's own codes from drawn ones (Lezama et al. 2022)."""
    null_text_length: int | None = None
    """Positions of a learned text, which stands for a dropped one; null: none is learned."""

    def check_null_text(self) -> None:
        """Raises ValueError for a text without positions."""
        if self.null_text_length is not None and self.null_text_length < 1:
            raise ValueError(f"null_text_length={self.null_text_length}: legal are null, 1 or more")


@dataclass
class MaskGitTransformerConfig(ExtensionFields):
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
        self.check_null_text()
        if self.null_text_length and not self.add_cross_attention:
            raise ValueError("null_text_length is for text: set add_cross_attention, or take null")
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


@dataclass
class MaskGiTUViTConfig(ExtensionFields):
    """Constructor keywords, YAML section model.transformer and config.json in one."""

    hidden_size: int = 1024
    """Width D of the transformer."""
    use_bias: bool = False
    """Biases in linear layers, convolutions and layer norms."""
    hidden_dropout: float = 0.0
    """Dropout inside the feed-forward and residual blocks."""
    cond_embed_dim: int = 768
    """Width of the pooled text vector."""
    micro_cond_encode_dim: int = 256
    """Sines and cosines for each micro-condition."""
    micro_cond_embed_dim: int = 1280
    """Micro-conditions times micro_cond_encode_dim."""
    encoder_hidden_size: int = 768
    """Width of the text states."""
    vocab_size: int = 8256
    """Codes, padding and the mask (the last id)."""
    codebook_size: int = 8192
    """K, codes of the VQ model, and the number of logits."""
    in_channels: int = 768
    """Width of the code embeddings."""
    block_out_channels: tuple[int, ...] = (768,)
    """Channels C of the residual blocks: one level."""
    num_res_blocks: int = 3
    """Residual and attention blocks before and after the transformer."""
    force_down_up_sample: bool = False
    """Run the transformer on half the grid, as the 512 models do."""
    block_num_heads: int = 12
    """Heads of the attention blocks; must divide C."""
    num_hidden_layers: int = 22
    """Transformer layers."""
    num_attention_heads: int = 16
    """Heads; must divide hidden_size."""
    attention_dropout: float = 0.0
    """Dropout of attention weights."""
    intermediate_size: int = 2816
    """Inner width of the feed-forward layers."""
    use_fused_mlp: bool = False
    """A plain tanh-GELU feed-forward instead of the gated one."""
    norm_type: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Norms (the feed-forward's first is always LayerNorm)."""
    layer_norm_eps: float = 1e-6
    """Epsilon of every norm."""
    ln_elementwise_affine: bool = True
    """Norms have weights."""
    use_fused_residual_norm: bool = False
    """Accepted and ignored: in the original another kernel for the same function."""
    add_cond_embeds: bool = True
    """Kept for callers: the model is given a pooled text vector."""
    add_micro_cond_embeds: bool = True
    """Kept for callers: the model is given micro-conditions."""

    def __post_init__(self) -> None:
        self.check_null_text()
        if isinstance(self.block_num_heads, list | tuple):  # old configs have a list of one
            (self.block_num_heads,) = self.block_num_heads
        if len(self.block_out_channels) != 1:
            raise ValueError(
                f"block_out_channels {self.block_out_channels}: one level only; checkpoints of "
                "several levels are of the first U-ViT, which this model cannot load"
            )
        if self.vocab_size <= self.codebook_size:
            raise ValueError(
                f"vocab_size {self.vocab_size} has no room for a mask beside {self.codebook_size} "
                "codes"
            )
        if self.micro_cond_embed_dim % self.micro_cond_encode_dim:
            raise ValueError(
                f"micro_cond_embed_dim {self.micro_cond_embed_dim} is no multiple of "
                f"micro_cond_encode_dim {self.micro_cond_encode_dim}"
            )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
