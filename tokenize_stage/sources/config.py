"""Options of step 1 (dataset.*); each field's sentence is its --help."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from tokenize_stage.pixels.config import PreprocessingConfig


@dataclass
class DatasetConfig:
    shards_path_or_url: str = MISSING
    """Image folder (class = sub-folder), or webdataset tars: folder, glob, braces, several by ::"""
    images_per_shard: int = 10_000
    """Images in one shard, when the input is an image folder; a tar is always one shard."""
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)

    def __post_init__(self) -> None:
        if self.images_per_shard < 1:
            key = "dataset.images_per_shard"
            raise ValueError(f"{key}={self.images_per_shard}: it must be at least 1")
