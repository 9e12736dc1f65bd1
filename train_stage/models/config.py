"""model.*: the transformer, and what of it follows from the store."""

from dataclasses import dataclass, field
from typing import Any, Literal

from configs.load import ConfigError, build_section, open_section
from storage.schema import StoreMeta, Tokenizer
from train_stage.models.attention import AttentionBackend
from train_stage.models.sizes import size_fields
from train_stage.models.transformer import MaskGitTransformerConfig


@dataclass
class VQModelConfig:
    pretrained: str | None = None
    """Folder or hub name of the VQ model for pictures; null takes the one the store names."""


@dataclass
class ModelConfig:
    size: Literal["tiny", "small", "base", "large", "xl"] | None = None
    """Keywords of MaskGitTransformer by the name of a size; model.transformer goes before it."""
    transformer: dict[str, Any] = open_section(MaskGitTransformerConfig)
    """Keywords of MaskGitTransformer."""
    vq_model: VQModelConfig = field(default_factory=VQModelConfig)
    pretrained_model_path: str | None = None
    """Start from these weights (folder or hub name) instead of random ones."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more time."""
    attention: AttentionBackend = "sdpa"
    """sdpa is PyTorch's, xformers needs that package and a GPU, plain spells the equation."""

    def transformer_given(self) -> dict[str, Any]:
        """The size's keywords, and over them model.transformer's."""
        return {**(size_fields(self.size) if self.size else {}), **self.transformer}


def transformer_fields(
    given: dict[str, Any], meta: StoreMeta, column: str, largest_class_id: int
) -> dict[str, Any]:
    """The transformer's keywords: what was given, and codes, positions, classes from the store.

    largest_class_id: of the rows, -1 when they have none. Raises ConfigError for a value that
    contradicts the store.
    """
    if given.get("add_cross_attention"):
        raise ConfigError("model.transformer.add_cross_attention=true: stores hold no text states")
    tokenizer = tokenizer_of(meta, column)
    height, width = tokenizer.grid
    derived = {"codebook_size": tokenizer.codebook_size, "num_vq_tokens": height * width}
    names = meta.transform.get("class_names") or []
    if names:
        derived["num_classes"] = len(names)
    for name, value in derived.items():
        if given.get(name, value) != value:
            raise ConfigError(
                f"model.transformer.{name}={given[name]}, but the store (made by {tokenizer.name}) "
                f"has {value}: drop the override, it follows the store"
            )
    fields = {"num_classes": largest_class_id + 1 or None, **given, **derived}
    if (fields["num_classes"] or 0) <= largest_class_id:
        raise ConfigError(
            f"model.transformer.num_classes={fields['num_classes']}, but the store has class ids "
            f"up to {largest_class_id}: drop the override, it follows the store"
        )
    build_section(MaskGitTransformerConfig, fields, "model.transformer")
    return fields


def tokenizer_of(meta: StoreMeta, column: str) -> Tokenizer:
    """The tokenizer of a column of codes. Raises ConfigError naming the columns there are."""
    if column not in meta.tokenizers:
        raise ConfigError(f"dataset.codes_column={column}: the store has {list(meta.tokenizers)}")
    return meta.tokenizers[column]
