"""model.*: the transformer, and what of it follows from the store and the text encoders."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from configs.load import ConfigError, build_section, open_section
from storage.schema import StoreMeta, Tokenizer
from train_stage.conditioning.config import ConditionFields
from train_stage.models.attention import AttentionBackend
from train_stage.models.sizes import size_fields
from train_stage.models.transformer import MaskGitTransformerConfig
from train_stage.models.uvit import MaskGiTUViTConfig

CONFIGS: dict[str, Any] = {"transformer": MaskGitTransformerConfig, "uvit": MaskGiTUViTConfig}


@dataclass
class AnyTransformerConfig(MaskGitTransformerConfig, MaskGiTUViTConfig):  # type: ignore[misc]
    """The keywords of both architectures, for --help and to find misspelt ones."""


@dataclass
class VQModelConfig:
    pretrained: str | None = None
    """Folder or hub name of the VQ model for pictures; null takes the one the store names."""


@dataclass
class ModelConfig(ConditionFields):
    architecture: Literal["transformer", "uvit"] = "transformer"
    """MaskGitTransformer, for classes or text; or MaskGiTUViT, for text, which is told the sizes of
    images, too."""
    size: Literal["tiny", "small", "base", "large", "xl"] | None = None
    """Keywords of the architecture by the name of a size; model.transformer goes before it."""
    transformer: dict[str, Any] = open_section(AnyTransformerConfig)
    """Keywords of the architecture."""
    vq_model: VQModelConfig = field(default_factory=VQModelConfig)
    pretrained_model_path: str | None = None
    """Start from these weights (folder or hub name) instead of random ones."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more time."""
    attention: AttentionBackend = "sdpa"
    """sdpa is PyTorch's, xformers needs that package and a GPU, plain spells the equation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {entry.name for entry in fields(CONFIGS[self.architecture])}
        if strange := sorted(set(self.transformer) - known):
            raise ConfigError(
                f"model.transformer.{strange[0]}: not a keyword of model.architecture="
                f"{self.architecture}; those are {', '.join(sorted(known))}"
            )
        if self.architecture == "uvit" and not self.text_encoders:
            raise ConfigError("model.architecture=uvit reads text: give model.text_encoders")

    def transformer_given(self) -> dict[str, Any]:
        """The size's keywords, and over them model.transformer's."""
        sized = size_fields(self.size, self.architecture) if self.size else {}
        return {**sized, **self.transformer}


def model_fields(
    config: ModelConfig,
    meta: StoreMeta,
    column: str,
    largest_class_id: int,
    text_widths: tuple[int, int] | None,
) -> dict[str, Any]:
    """The keywords of the model: what was given, and what follows from the store and the encoders.

    largest_class_id: of the rows, -1 when they have none. text_widths: W and C of the text, None
    without. Raises ConfigError for a value that contradicts them.
    """
    given, tokenizer = config.transformer_given(), tokenizer_of(meta, column)
    height, width = tokenizer.grid
    derived = {"codebook_size": tokenizer.codebook_size}
    if config.architecture == "uvit":
        derived |= uvit_fields(tokenizer)
    else:
        derived["num_vq_tokens"] = height * width
    names = meta.transform.get("class_names") or []
    if names and text_widths is None:
        derived["num_classes"] = len(names)
    if config.class_prompt is not None and largest_class_id >= len(names):
        raise ConfigError(
            f"model.class_prompt: the store names {len(names)} classes, but has class ids up to "
            f"{largest_class_id}"
        )
    for name, value in derived.items():
        if given.get(name, value) != value and name != "vocab_size":
            raise ConfigError(
                f"model.transformer.{name}={given[name]}, but the store (made by {tokenizer.name}) "
                f"has {value}: drop the override, it follows the store"
            )
    made = {**derived, **given, **text_fields(config, text_widths)}
    if config.architecture == "transformer" and (text_widths is None or made.get("num_classes")):
        made = with_classes(made, largest_class_id)
    if config.null_condition != "learned" and made.get("null_text_length"):
        raise ConfigError(
            f"model.transformer.null_text_length={made['null_text_length']} is the length of a "
            "learned text: give model.null_condition=learned, or drop it"
        )
    build_section(CONFIGS[config.architecture], made, "model.transformer")
    return made


def uvit_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """Of a U-ViT: the vocabulary, padded as published (8192 codes: 8256)."""
    height, width = tokenizer.grid
    if height != width:
        raise ConfigError(f"model.architecture=uvit wants square grids; codes are {height}x{width}")
    return {"vocab_size": -(-(tokenizer.codebook_size + 1) // 64) * 64}


def text_fields(config: ModelConfig, widths: tuple[int, int] | None) -> dict[str, Any]:
    """What of the model follows from the text encoders. Raises ConfigError for a contradiction."""
    given = config.transformer_given()
    if widths is None:
        if given.get("add_cross_attention"):
            raise ConfigError(
                "model.transformer.add_cross_attention=true, but nothing makes text states: give "
                "model.text_encoders"
            )
        return {}
    derived: dict[str, Any] = {"encoder_hidden_size": widths[0]}
    if config.architecture == "uvit":
        derived["cond_embed_dim"] = widths[1]
    else:
        derived["add_cross_attention"] = True
    for name, value in derived.items():
        if given.get(name, value) != value:
            raise ConfigError(
                f"model.transformer.{name}={given[name]}, but the text encoders make it {value}: "
                "drop the override, it follows them"
            )
    return derived


def with_classes(made: dict[str, Any], largest_class_id: int) -> dict[str, Any]:
    """With as many classes as the rows need. Raises ConfigError where too few were given."""
    made = {"num_classes": largest_class_id + 1 or None, **made}
    if (made["num_classes"] or 0) <= largest_class_id:
        raise ConfigError(
            f"model.transformer.num_classes={made['num_classes']}, but the store has class ids "
            f"up to {largest_class_id}: drop the override, it follows the store"
        )
    return made


def tokenizer_of(meta: StoreMeta, column: str) -> Tokenizer:
    """The tokenizer of a column of codes. Raises ConfigError naming the columns there are."""
    if column not in meta.tokenizers:
        raise ConfigError(f"dataset.codes_column={column}: the store has {list(meta.tokenizers)}")
    return meta.tokenizers[column]
