"""What step 1 takes and gives: an input shard, and a sample as it came or why there is none."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_CLASS_ID = 2**31 - 1  # class_id is an int32 column
MAX_CAPTION_BYTES = 2**20


@dataclass(frozen=True)
class TablePart:
    """Consecutive rows of a table. columns: which of them is image, caption, class_id, key.

    label_ids: class ids of text labels. offset: of a CSV file, where the first row begins.
    """

    path: str
    first: int
    count: int
    columns: Mapping[str, str]
    label_ids: Mapping[str, int] = field(default_factory=dict)
    offset: int = 0


@dataclass(frozen=True)
class TarPart:
    """A tar of which more is to be said than its place; it may lie within another tar."""

    path: str
    class_id: int | None  # of all its images
    offset: int = 0
    size: int | None = None  # None: up to the end of the file
    caption: str | None = None  # what captions are called in the metadata


@dataclass(frozen=True)
class InputShard:
    """What is read to make the shard `name` of the store; `source` says what, for people.

    Of `files` (relative path and class of every file of an image folder), `table` and `tar` at
    most one is there; without them `source` is a webdataset tar. class_names: of class 0, 1, 2, …
    """

    name: str
    source: str
    files: tuple[tuple[str, int | None], ...] | None = None
    class_names: tuple[str, ...] = ()
    table: TablePart | None = None
    tar: TarPart | None = None

    @property
    def sample_count(self) -> int | None:
        """How many samples it has, where that is known before it is read."""
        if self.files is not None:
            return len(self.files)
        return self.table.count if self.table else None

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, for a plan."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "InputShard":
        files, table, tar = (content.get(name) for name in ("files", "table", "tar"))
        return cls(
            content["name"],
            content["source"],
            files and tuple((path, class_id) for path, class_id in files),
            tuple(content.get("class_names", ())),
            table and TablePart(**table),
            tar and TarPart(**tar),
        )


@dataclass(frozen=True)
class Sample:
    """One source image as it came: its undecoded bytes, its labels and its metadata.

    metadata: the sample's JSON object, or the other columns of its row in a table.
    """

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


def checked_class_id(class_id: int) -> int:
    """Raises ValueError for a class that an int32 column cannot hold."""
    if not 0 <= class_id <= MAX_CLASS_ID:
        raise ValueError(f"class {str(class_id)[:30]} is not in 0..{MAX_CLASS_ID}")
    return class_id


def checked_caption(caption: object) -> str | None:
    """Raises ValueError for what is no text, no UTF-8 (a lone surrogate) or too long."""
    if not isinstance(caption, str | None):
        raise ValueError(f"caption is a {type(caption).__name__}")
    if caption and len(caption.encode()) > MAX_CAPTION_BYTES:
        raise ValueError(f"caption of {len(caption)} characters, at most {MAX_CAPTION_BYTES} bytes")
    return caption


def suffix_of(name: str) -> str:
    """What follows the last dot of a path or URL, in lower case: "photo.JPG?size=9" -> "jpg"."""
    last = name.partition("?")[0].rpartition("/")[2] if "://" in name else name.rpartition("/")[2]
    stem, _, suffix = last.rpartition(".")
    return suffix.lower() if stem else ""
