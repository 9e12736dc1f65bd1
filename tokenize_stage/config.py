"""Options of muse-tokenize; each field's sentence is its --help."""

import re
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from configs.load import check_range
from tokenize_stage.selection.config import FiltersConfig
from tokenize_stage.sources.config import DatasetConfig
from tokenize_stage.text.config import TextConfig


@dataclass
class SoftCodesConfig:
    topk: int | None = None
    """Keep this many of the nearest codes of each latent, too, as soft targets for training:
    columns topk_codes and topk_weights, 4 bytes a code of each. None: the code alone."""
    topk_temperature: float = 1.0
    """Their weights are softmax(-squared distance / topk_temperature)."""

    def check(self, key: str) -> None:
        """Raises ValueError, naming the option below `key`, for what cannot be."""
        if self.topk is not None:
            check_range(f"{key}.topk", self.topk, 1)
        if self.topk_temperature <= 0:
            raise ValueError(f"{key}.topk_temperature={self.topk_temperature}: must be above 0")


@dataclass
class VQModelConfig(SoftCodesConfig):
    pretrained: str | None = None
    """Tokenizer: a model directory, or its name on the Hugging Face hub. It, or vq_models."""


@dataclass
class NamedVQModelConfig(SoftCodesConfig):
    pretrained: str = MISSING
    """Tokenizer: a model directory, or its name on the Hugging Face hub."""
    resolution: int | None = None
    """Side in pixels at which it sees the images; None: dataset.preprocessing.resolution."""


@dataclass
class ModelConfig:
    vq_model: VQModelConfig = field(default_factory=VQModelConfig)
    vq_models: dict[str, NamedVQModelConfig] = field(default_factory=dict)
    """Several tokenizers in one pass: {NAME: {pretrained: …, resolution: …}} gives codes_NAME."""

    def __post_init__(self) -> None:
        if self.vq_model.pretrained is not None and self.vq_models:
            raise ValueError("model.vq_model.pretrained and model.vq_models: give one of them")
        self.vq_model.check("model.vq_model")
        for name, model in self.vq_models.items():
            model.check(f"model.vq_models.{name}")
            if not re.fullmatch("[a-z0-9_]+", name):
                raise ValueError(f"model.vq_models.{name}: names are of a-z, 0-9 and _")
            if model.resolution is not None and model.resolution < 1:
                key = f"model.vq_models.{name}.resolution"
                raise ValueError(f"{key}={model.resolution}: it must be at least 1")


@dataclass
class StoreConfig:
    path: str = MISSING
    """Directory of the token store; made, or continued when it holds the same kind of codes."""
    backend: Literal["zarr", "arrow"] = "zarr"
    """File format of the codes: compressed Zarr v3, or memory-mapped Arrow."""
    chunk_rows: int = 1024
    """Rows that are compressed, checked and read together."""


@dataclass
class EncodeConfig:
    batch_size: int | None = None
    """Images encoded at once; None: 128 on a GPU, 8 on a CPU. Codes do not depend on it."""
    decode_threads: int | None = None
    """Threads that decode and resize images; None: one for each CPU this process may use."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the encoder; auto: float16 on a GPU, float32 on a CPU. The nearest code is always sought
    in float32; below float32 some codes change, so it stands in the store."""
    compile: bool = False
    """Whether the encoder is compiled, which takes minutes at the start and needs a compiler."""


@dataclass
class TokenizeConfig:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    task: int | None = None
    """Number of this task, 0..tasks-1; None: from Slurm, else 0."""
    tasks: int | None = None
    """Tasks that share the work, each taking every tasks-th shard; None: from Slurm, else 1."""
    only: Literal["all", "missing", "failed"] = "all"
    """Of the shards that the store lacks: all, missing (but those that failed before), failed."""

    def __post_init__(self) -> None:
        counts = {
            "store.chunk_rows": self.store.chunk_rows,
            "encode.batch_size": self.encode.batch_size,
            "encode.decode_threads": self.encode.decode_threads,
        }
        for key, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{key}={count}: it must be at least 1")
