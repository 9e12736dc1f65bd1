"""Options of muse-tokenize audit; each field's sentence is its --help."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

WAYS = ("bfloat16", "float16", "tf32", "compile", "full_decode", "dct_scaling", "gpu_decode")


@dataclass
class AuditConfig:
    store: str = MISSING
    """The token store to look at, a folder or a URL."""
    rows: int = 64
    """Rows that are looked at."""
    shards: int = 8
    """Shards that they are drawn from; of each the input is read up to the last of its rows."""
    seed: int = 0
    """Of the drawing of shards and rows."""
    sheet_rows: int = 16
    """Rows that are shown on the sheet."""
    compare: list[str] = field(default_factory=list)
    """Ways to encode whose codes are compared with the exact ones (float32, pixels by Pillow):
    bfloat16, float16, tf32, compile; full_decode, dct_scaling, gpu_decode."""
    sources: Any = None
    """Where the images are now, as in dataset.shards_path_or_url; None: where they were encoded."""
    tokenizers: dict[str, str] = field(default_factory=dict)
    """Where a tokenizer is now, by column: {codes: FOLDER}; else where it was."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    batch_size: int = 16
    """Images encoded and decoded at once."""
    out: str | None = None
    """Folder for audit.json and sheet.png; None: STORE/audit."""

    def __post_init__(self) -> None:
        for name in ("rows", "shards", "sheet_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        unknown = sorted(set(self.compare) - set(WAYS))
        if unknown:
            raise ValueError(f"compare={unknown}: legal are {', '.join(WAYS)}")
