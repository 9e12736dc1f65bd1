"""What step 1 gives: a sample as it came, or why there is none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_CLASS_ID = 2**31 - 1  # class_id is an int32 column


@dataclass(frozen=True)
class Sample:
    """One source image as it came: its undecoded bytes, its labels and its metadata (JSON)."""

    key: str
    data: bytes
    class_id: int | None
    caption: str | None
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A sample that gives no row. `reason` reads `kind: detail`."""

    key: str
    source: str
    reason: str


def stored_key(name: str) -> str:
    """A file name as text that can be stored: bytes that are no UTF-8 become �."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
