"""Options of the selection (filters.*), of scan and of dedup; each sentence is its --help."""

import math
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from tokenize_stage.sources.config import DatasetConfig

METADATA = ("size", "aesthetic", "watermark", "nsfw", "getty", "spawning", "url")


@dataclass
class FiltersConfig:
    """What is encoded, what is rejected. By default only what is marked as opted out is.

    The reference's filter for LAION and COYO: min_size=256 min_aesthetic_score=4.75
    max_watermark=0.5 require_metadata=[size,aesthetic,watermark] drop_spawning=false.
    """

    min_size: int = 0
    """Least shorter side in pixels, of the original where metadata says, else of the image read."""
    max_aspect: float | None = None
    """Most that the longer side may be, in shorter sides; None: any."""
    min_aesthetic_score: float | None = None
    """Least aesthetic score; each that metadata has must reach it. None: any."""
    max_watermark: float | None = None
    """Highest probability of a watermark, 0..1; none that metadata has may exceed it. None: any."""
    max_nsfw: float | None = None
    """Highest NSFW probability, 0..1; LAION's UNSURE counts as 0.5, NSFW as 1. None: any."""
    require_metadata: list[str] = field(default_factory=list)
    """What metadata must say: size, aesthetic, watermark, nsfw, getty, spawning, url; what it does
    not say passes, unless it is named here."""
    drop_getty: bool = False
    """Whether images marked as Getty's are rejected."""
    drop_spawning: bool = True
    """Whether images whose owners opted out with Spawning (is_spawning) are rejected."""
    respect_noai: bool = True
    """Whether images published with `noai` or `noimageai` are rejected."""
    min_caption_words: int = 0
    """Fewest words of a caption; an image without one has 0."""
    max_caption_chars: int | None = None
    """Most characters of a caption; None: any."""
    merge_person_tokens: bool = False
    """Whether runs of `<person>` in captions (CC12M) become "people"."""
    deny_urls: list[str] = field(default_factory=list)
    """Files of URLs to reject: text, one a line (# comments, .gz too), or Parquet (column url).
    An image without a URL passes: see require_metadata."""
    deny_domains: list[str] = field(default_factory=list)
    """Files of domains to reject, with their subdomains; as deny_urls (column domain)."""
    deny_hashes: list[str] = field(default_factory=list)
    """Files of hex hashes to reject: sha256 of the bytes read or as in metadata, md5 as in
    metadata, perceptual (16 digits); as deny_urls (columns sha256, image_hash, md5, phash, …)."""
    phash: bool = False
    """Whether each image's perceptual hash is computed: stored, and sought in deny_hashes."""
    duplicates: str | None = None
    """The file that `muse-tokenize dedup` wrote; None: duplicates are not looked for."""
    on_duplicate: Literal["drop", "mark"] = "drop"
    """drop: duplicates are rejected; mark: the column duplicate_of names what they repeat."""

    def __post_init__(self) -> None:
        least = {
            "min_size": (self.min_size, 0, math.inf),
            "max_aspect": (self.max_aspect, 1, math.inf),
            "min_aesthetic_score": (self.min_aesthetic_score, -math.inf, math.inf),
            "max_watermark": (self.max_watermark, 0, 1),
            "max_nsfw": (self.max_nsfw, 0, 1),
            "min_caption_words": (self.min_caption_words, 0, math.inf),
            "max_caption_chars": (self.max_caption_chars, 0, math.inf),
        }
        for name, (value, low, high) in least.items():
            if value is not None and not low <= value <= high:
                raise ValueError(f"filters.{name}={value}: it must be in {low}..{high}")
        unknown = sorted(set(self.require_metadata) - set(METADATA))
        if unknown:
            legal = ", ".join(METADATA)
            raise ValueError(f"filters.require_metadata={unknown}: legal are {legal}")


@dataclass
class ScanConfig:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    out: str = MISSING
    """Directory of the scans, one Parquet file an input shard; made, or continued."""
    phash: Literal["image", "metadata", "none"] = "image"
    """Perceptual hashes: of the decoded images, of the metadata (COYO's image_phash; nothing is
    decoded then), or none."""
    threads: int | None = None
    """Threads that decode; None: one for each CPU this process may use."""
    task: int | None = None
    """Number of this task, 0..tasks-1; None: from Slurm, else 0."""
    tasks: int | None = None
    """Tasks that share the work, each taking every tasks-th shard; None: from Slurm, else 1."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads}: it must be at least 1")


@dataclass
class DedupConfig:
    scans: str = MISSING
    """Directory that muse-tokenize scan wrote."""
    out: str = MISSING
    """File of duplicates to write (.parquet), for filters.duplicates."""
    distance: int | None = 4
    """Bits in which perceptual hashes of near duplicates may differ, 0..8; None: equal bytes."""
    keep: Literal["first", "largest"] = "first"
    """Which image of a group is none: the first by shard and place, or that of most pixels."""
    partial: bool = False
    """Whether scans of some shards may be missing."""

    def __post_init__(self) -> None:
        if self.distance is not None and not 0 <= self.distance <= 8:
            raise ValueError(f"distance={self.distance}: it must be in 0..8, or None")
