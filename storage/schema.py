"""What a token store is: store.json as dataclasses, and the columns of a row.

storage/README.md is the format of every file, field by field.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from storage.atomic import parse_json, write_json
from storage.files import StoreFiles, open_files
from storage.fingerprint import fingerprint

SCHEMA_VERSION = 2  # 2: manifests say layout, content, columns; shard versions, tombstones, index
Backend = Literal["zarr", "arrow"]

TABLE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # unique within its source
        pa.field("class_id", pa.int32()),
        pa.field("caption", pa.string()),
        pa.field("original_height", pa.int32()),  # pixels, after EXIF rotation
        pa.field("original_width", pa.int32()),
        pa.field("crop_top", pa.float32()),  # the crop box, in pixels of the original
        pa.field("crop_left", pa.float32()),
        pa.field("crop_height", pa.float32()),
        pa.field("crop_width", pa.float32()),
        pa.field("view", pa.int16()),  # 0 = centre crop
        pa.field("source", pa.string()),  # the input shard
    ]
)
SKIPPED_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("key", "source", "reason")]
)


class StoreMismatch(ValueError):
    """A store does not hold what was asked of it; the message names the differing field."""


@dataclass
class ArrayColumn:
    """A column of fixed-size rows: `dtype` (numpy name) and the shape of one row."""

    dtype: str
    shape: list[int]


@dataclass
class Tokenizer:
    """Which VQ model made a column of codes."""

    name: str
    class_name: str
    codebook_size: int
    grid: list[int]  # [h, w]
    fingerprint: str  # storage.pretrained.model_fingerprint


@dataclass
class StoreMeta:
    """store.json. `transform` says how pixels were made; `fingerprint` covers it and the codes."""

    resolution: int
    arrays: dict[str, ArrayColumn]
    tokenizers: dict[str, Tokenizer]
    transform: dict[str, Any] = field(default_factory=dict)
    backend: Backend = "zarr"
    chunk_rows: int = 1024
    schema_version: int = SCHEMA_VERSION

    @property
    def fingerprint(self) -> str:
        """sha256 of everything the codes depend on: not backend, chunk size, tokenizer's path."""
        content = dataclasses.asdict(self) | {"schema_version": 1}  # of this recipe, not of files
        for name in ("backend", "chunk_rows"):
            content.pop(name)
        text = content["transform"].get("text", {}).get("tokenizers", {})
        for tokenizer in [*content["tokenizers"].values(), *text.values()]:
            tokenizer.pop("name")
        return fingerprint(content)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "fingerprint": self.fingerprint}


def codes_dtype(codebook_size: int) -> str:
    """The smallest unsigned dtype for codes in [0, codebook_size): uint16 or uint32."""
    return "uint16" if codebook_size <= 2**16 else "uint32"


def write_meta(path: Path, meta: StoreMeta) -> None:
    """Writes STORE/store.json atomically."""
    write_json(path / "store.json", meta.to_json())


def raise_version(path: Path) -> None:
    """Notes in store.json that the store has what readers of older versions do not know."""
    meta = read_meta(path)
    if meta.schema_version < SCHEMA_VERSION:
        write_meta(path, dataclasses.replace(meta, schema_version=SCHEMA_VERSION))


def read_meta(store: Path | StoreFiles) -> StoreMeta:
    """Reads STORE/store.json. Raises FileNotFoundError or ValueError (damaged, newer version)."""
    files = open_files(store) if isinstance(store, Path) else store
    try:
        content = files.read("store.json")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{files.url} is not a token store (no store.json); muse-tokenize makes one"
        ) from None
    return meta_from_json(parse_json(content, f"{files.url}/store.json"), files.url)


def meta_from_json(content: dict[str, Any], name: str) -> StoreMeta:
    """StoreMeta.to_json backwards. Raises ValueError, naming the store, for a newer version."""
    version = content["schema_version"]
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{name} is of schema version {version}, this code reads up to {SCHEMA_VERSION}: "
            "update Open-MUSE"
        )
    content = {key: value for key, value in content.items() if key != "fingerprint"}
    content["arrays"] = {k: ArrayColumn(**v) for k, v in content["arrays"].items()}
    content["tokenizers"] = {k: Tokenizer(**v) for k, v in content["tokenizers"].items()}
    return StoreMeta(**content)


def first_difference(ours: StoreMeta, theirs: StoreMeta) -> str | None:
    """The first field in which two metas differ, as `name: ours != theirs`, or None.

    The name of a tokenizer does not count: its fingerprint decides, wherever it lies.
    """
    a, b = _flatten(ours.to_json()), _flatten(theirs.to_json())
    for key in sorted(a | b):
        path = key.split(".")
        if key in ("fingerprint", "schema_version"):
            continue
        if path[-3:-2] == ["tokenizers"] and path[-1] == "name":
            continue
        if a.get(key) != b.get(key):
            return f"{key}: {a.get(key)!r} != {b.get(key)!r}"
    return None


def check_codes(codes: np.ndarray, column: ArrayColumn, codebook_size: int | None) -> np.ndarray:
    """Codes as the column's dtype. Raises ValueError for another shape or a code out of range."""
    if list(codes.shape[1:]) != column.shape:
        raise ValueError(f"rows of shape {list(codes.shape[1:])}, the store holds {column.shape}")
    if codebook_size and codes.size and not 0 <= codes.min() <= codes.max() < codebook_size:
        found = f"{codes.min()}..{codes.max()}"
        raise ValueError(f"codes in {found}, the codebook has [0, {codebook_size})")
    with np.errstate(invalid="ignore"):  # of NaN
        converted = np.ascontiguousarray(codes, dtype=column.dtype)
    if converted.dtype.kind in "iu" and not np.array_equal(converted, codes):
        raise ValueError(f"values of {codes.dtype} that {column.dtype} cannot hold")
    return converted


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
