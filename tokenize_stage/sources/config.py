"""Options of step 1 (dataset.*); each field's sentence is its --help."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from tokenize_stage.pixels.config import PreprocessingConfig


@dataclass
class ColumnsConfig:
    image: str | None = None
    """Column of image bytes, {bytes, path}, paths or URLs; None: image, jpg, url or a like name."""
    caption: str | None = None
    """Column of captions; None: caption, text, txt or prompt, if there is one. Of tars, the name in
    the json, such as alt_text or top_caption; None: the member txt, else caption in the json."""
    class_id: str | None = None
    """Column of class numbers, or names of dataset.class_index; None: class_id, label or cls."""
    key: str | None = None
    """Column of unique names; None: key or __key__, else the number of the row in its table."""


@dataclass
class DatasetConfig:
    shards_path_or_url: Any = MISSING
    """Image folder (class = sub-folder), webdataset tars (paths, URLs, pipe: commands), saved
    datasets, Parquet, CSV or TSV; globs, braces, a list, @FILE of a list, several by ::"""
    images_per_shard: int = 10_000
    """Images in one shard, when the input is a folder or table; a tar is always one shard."""
    class_index: str | None = None
    """File that numbers the classes: {"0": ["n01440764", "tench"]}, {"n01440764": 0}, or a name a
    line; None: sub-folders and class tars are numbered in the order of their names."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    max_sample_bytes: int = 100_000_000
    """A sample with more than this is skipped, with the reason, and never held in memory."""
    max_shard_bytes: int = 2**40
    """Reading of a tar ends here, with the reason: no stream is endless."""
    read_timeout_s: float = 120.0
    """A source that gives no byte for so long is read again."""
    read_attempts: int = 3
    """Attempts to read an input shard, with growing pauses, before it counts as failed."""
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)

    def __post_init__(self) -> None:
        names = ("images_per_shard", "max_sample_bytes", "max_shard_bytes", "read_attempts")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"dataset.{name}={getattr(self, name)}: it must be at least 1")
        if not self.read_timeout_s > 0:
            raise ValueError(f"dataset.read_timeout_s={self.read_timeout_s}: it must be above 0")
        given = self.shards_path_or_url
        if given is None or isinstance(given, dict) or given == []:
            raise ValueError(f"dataset.shards_path_or_url={given!r}: give a path or a list of them")
        self.shards_path_or_url = [*map(str, given)] if isinstance(given, list) else str(given)
