"""dataset.*: which rows are trained on, and how they are read."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from configs.load import check_range
from train_stage.loading.store_stream import Preload, Shuffle, Views


@dataclass
class MixtureEntry:
    store: str = MISSING
    """A token store, made by the same tokenizer as the others."""
    weight: float | None = None
    """Its share of the rows, relative to the other stores' weights; null: rows x repeat."""
    repeat: float = 1.0
    """Without weights: how often its rows come, relative to the other stores'."""
    filter: str | None = None
    """As dataset.filter, for this store."""


@dataclass
class DatasetConfig:
    train_store: str | None = None
    """The token store to train on: a folder, or a URL (s3://, https://). Or give a mixture."""
    mixture: list[MixtureEntry] = field(default_factory=list)
    """Several token stores to train on, in place of train_store."""
    eval_store: str | None = None
    """A token store for the validation loss, made by the same tokenizer."""
    codes_column: str = "codes"
    """The array column of the store that holds the codes."""
    filter: str | None = None
    """Train on rows that pass, as "aesthetic_score >= 5 and nsfw_score < 0.5"; any table column."""
    views: Views = "all"
    """all: every view of an image comes once an epoch; one: one of them, another every epoch."""
    shuffle: Shuffle = "full"
    """full: any row may follow any other; window: rows are mixed among window_chunks chunks, read
    one after the other, for stores larger than memory or far away."""
    window_chunks: int = 256
    """Chunks (of 1,024 rows, as a rule) in a window, three of which are held: 400 MB of 256 codes a
    row. More mix better; a store in random order needs few."""
    preload: Preload = "auto"
    """Where the codes are kept: ram, gpu, or none (mapped from a local arrow store, or through
    windows); auto: none where that is as fast, else ram. The order does not depend on it."""
    states_gb: float = 16.0
    """Text states that a process may hold in memory: all of them under shuffle=full, three windows
    under shuffle=window."""
    cache_gb: float = 10.0
    """How much of remote stores the local disk keeps ($MUSE_CACHE_DIR); 0 keeps nothing."""
    accept_changes: bool = False
    """Go on from a checkpoint though the stores have changed (rows dropped, shards added)."""

    def __post_init__(self) -> None:
        check_range("dataset.window_chunks", self.window_chunks, 1)
        check_range("dataset.states_gb", self.states_gb, 0)
        check_range("dataset.cache_gb", self.cache_gb, 0)
        if self.train_store is not None and self.mixture:
            raise ValueError("dataset.train_store or dataset.mixture, not both")
        if self.mixture and self.filter is not None:
            raise ValueError("dataset.filter: in a mixture every store has a filter of its own")
