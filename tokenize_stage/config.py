"""Options of muse-tokenize; each field's sentence is its --help."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from tokenize_stage.sources.config import DatasetConfig


@dataclass
class VQModelConfig:
    pretrained: str = MISSING
    """Tokenizer: a model directory, or its name on the Hugging Face hub."""


@dataclass
class ModelConfig:
    vq_model: VQModelConfig = field(default_factory=VQModelConfig)


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
    batch_size: int = 64
    """Images encoded at once."""
    decode_threads: int | None = None
    """Threads that decode and resize images; None: one for each CPU this process may use."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the encoder; the nearest code is always sought in float32. Below float32 codes change."""


@dataclass
class TokenizeConfig:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    task: int | None = None
    """Number of this task, 0..tasks-1; None: from Slurm, else 0."""
    tasks: int | None = None
    """Tasks that share the work, each taking every tasks-th shard; None: from Slurm, else 1."""

    def __post_init__(self) -> None:
        counts = {
            "store.chunk_rows": self.store.chunk_rows,
            "encode.batch_size": self.encode.batch_size,
            "encode.decode_threads": self.encode.decode_threads,
        }
        for key, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{key}={count}: it must be at least 1")
