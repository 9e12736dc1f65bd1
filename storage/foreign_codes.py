"""Codes as other projects wrote them, read sample by sample; storage/import_codes.py stores them.

webdataset  open-muse, scripts/pre_encode.py: KEY.<tokenizer>.pth (a tensor, (N,) int64), KEY.json;
            also .npy members, .cls, .txt, and what `muse-store export` writes
LlamaGen    autoregressive/train/extract_codes_c2i.py: X_codes/I.npy (1, views, N) int64 and
            X_labels/I.npy (1,); the views are the centre crop and its flip, or TenCrop's ten
JSON lines  1d-tokenizer, scripts/pretokenization.py: {"class_id": 7, "tokens": [N numbers]} a line;
            with --ten_crop ten lines an image. Without, a batch's flips follow the batch: which
            two lines are one image depends on its sizes, so they are imported as two (views=1)
Parquet     what `muse-store export` writes: codes as lists, and the columns of the table
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.pth_tensor import read_pth
from storage.schema import TABLE_SCHEMA, StoreMeta
from storage.tar_samples import TarSample, read_tar_samples

LABELS = ("cls", "json", "txt")
TEN_CROP = (2, 3, 4, 5, 0, 6, 7, 8, 9, 1)  # torchvision: corners, centre, then the same flipped


@dataclass(frozen=True)
class Sample:
    """codes: by array column, of one view (N,) or of several (views, N); labels: for the table."""

    key: str
    codes: dict[str, np.ndarray]
    labels: dict[str, Any]


@dataclass(frozen=True)
class Rejected:
    """What gives no row; `reason` reads `kind: detail`."""

    key: str
    reason: str


Outcome = Sample | Rejected


@dataclass(frozen=True)
class InputPart:
    """What becomes one shard. read: the names of the store's array columns -> samples.

    extra_columns: labels that are kept beside TABLE_SCHEMA's; all others are left out.
    """

    name: str
    source: str
    read: Callable[[list[str]], Iterator[Outcome]]
    extra_columns: pa.Schema | None = None


def webdataset_parts(
    sources: Sequence[str],
    members: dict[str, str] | None = None,
    extra_columns: pa.Schema | None = None,
) -> list[InputPart]:
    """One part a tar (path or URL); members: array column -> suffix (read_webdataset)."""
    return [
        InputPart(
            re.sub(r"\.(tar|tar\.gz|tgz)$", "", Path(source).name),
            source,
            partial(read_webdataset, source, members or {}),
            extra_columns,
        )
        for source in sources
    ]


def llamagen_parts(folder: Path, images_per_shard: int = 10_000) -> list[InputPart]:
    """folder: holds X_codes and X_labels, or is X_codes. Raises FileNotFoundError without them."""
    found = [folder] if folder.name.endswith("_codes") else sorted(folder.glob("*_codes"))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder} holds {len(found)} folders *_codes; give one of them")
    codes = found[0]
    labels = codes.with_name(codes.name.removesuffix("_codes") + "_labels")
    if not labels.is_dir():
        raise FileNotFoundError(f"{codes} has no labels: {labels} is not there")
    names = {path.name for place in (codes, labels) for path in place.glob("*.npy")}
    ordered = sorted(names, key=lambda name: (len(name), name))  # 2.npy before 10.npy
    parts = []
    for index, first in enumerate(range(0, len(ordered), images_per_shard)):
        chosen = ordered[first : first + images_per_shard]
        source = f"{codes}/{chosen[0]}..{chosen[-1]}"
        read = partial(read_llamagen, codes, labels, chosen)
        parts.append(InputPart(f"{codes.name}-{index:05d}", source, read))
    return parts


def json_lines_parts(path: Path, lines_per_shard: int = 10_000, views: int = 1) -> list[InputPart]:
    """views: how many lines that follow one another are one image (--ten_crop: 10).

    Reads the file once, for where its lines begin. Raises ValueError for a JSON array.
    """
    if lines_per_shard % views:
        raise ValueError(f"lines_per_shard={lines_per_shard} is no multiple of views={views}")
    parts: list[InputPart] = []
    with open(path, "rb") as file:
        if file.read(1) == b"[":
            raise ValueError(f"{path} is one JSON array: jq -c '.[]' {path} makes lines of it")
        file.seek(0)
        start, first = 0, 0
        while sizes := [len(line) for line in islice(file, lines_per_shard)]:
            source = f"{path}:{first}..{first + len(sizes) - 1}"
            read = partial(read_json_lines, path, start, first, len(sizes), views)
            parts.append(InputPart(f"{path.stem}-{len(parts):05d}", source, read))
            start, first = start + sum(sizes), first + len(sizes)
    return parts


def parquet_parts(paths: Sequence[Path], meta: StoreMeta) -> list[InputPart]:
    """One part a file; columns that the store does not know become extra columns."""
    parts = []
    for path in paths:
        known = {*TABLE_SCHEMA.names, *meta.arrays}
        extra = pa.schema([field for field in pq.read_schema(path) if field.name not in known])
        read = partial(read_parquet_rows, str(path))
        parts.append(InputPart(path.stem, str(path), read, extra))
    return parts


def view_number(place: int, views: int) -> int:
    """The `view` of the place-th of an image's views: 0 is the centre crop, 1 its flip."""
    return TEN_CROP[place] if views == 10 else place


def read_webdataset(source: str, members: dict[str, str], columns: list[str]) -> Iterator[Outcome]:
    """members: column -> suffix, for columns whose member is not called KEY.<column>.npy.

    With one column, the only .npy or .pth of a sample will do. Raises OSError without the tar.
    """
    named = {column: suffix.lower() for column, suffix in members.items()}

    def wanted(suffix: str) -> bool:
        return suffix in LABELS or (suffix in named.values() if named else _is_array(suffix))

    with fsspec.open(source, "rb") as stream:
        for sample in read_tar_samples(stream, wanted):
            yield _from_tar(sample, named, columns)


def read_llamagen(
    codes: Path, labels: Path, names: list[str], columns: list[str]
) -> Iterator[Outcome]:
    """The files of these names in two folders, `codes` and `labels`."""
    (column,) = columns
    for name in names:
        key, reading = name.removesuffix(".npy"), codes / name
        try:
            found = _read_array(name, reading.read_bytes())
            reading = labels / name
            class_id = int(_read_array(name, reading.read_bytes()).item())
        except FileNotFoundError:
            yield Rejected(key, f"no {reading.parent.name}: {reading}")
        except (ValueError, EOFError) as error:
            yield Rejected(key, f"unreadable {reading.parent.name}: {error}")
        else:
            yield Sample(key, {column: found}, {"class_id": class_id})


def read_json_lines(
    path: Path, start: int, first: int, count: int, views: int, columns: list[str]
) -> Iterator[Outcome]:
    """`count` lines from byte `start` on; `first` is the number of the first of them.

    Raises ValueError when `views` lines that follow one another are not of one class.
    """
    (column,) = columns
    image, image_class = -1, None
    with open(path, "rb") as file:
        file.seek(start)
        for number, line in enumerate(islice(file, count), first):
            key = str(number // views)
            try:
                content = json.loads(line)
                class_id, codes = content["class_id"], np.array(content["tokens"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                yield Rejected(key, f"unreadable line: number {number}, {error!r}")
                continue
            if image == number // views and class_id != image_class:
                raise ValueError(
                    f"{path}: line {number} is of class {class_id}, the one before of "
                    f"{image_class}: they are not of one image, as views={views} says; try views=1"
                )
            image, image_class = number // views, class_id
            labels = {"class_id": class_id}
            if views > 1:
                labels["view"] = view_number(number % views, views)
            yield Sample(key, {column: codes}, labels)


def read_parquet_rows(source: str, columns: list[str]) -> Iterator[Outcome]:
    """Rows of a Parquet file. Raises ValueError for one without `key` or a column of codes."""
    with fsspec.open(source, "rb") as stream, pq.ParquetFile(stream) as file:
        missing = {"key", *columns} - set(file.schema_arrow.names)
        if missing:
            raise ValueError(f"{source} has no column {sorted(missing)}")
        for batch in file.iter_batches(batch_size=4096):
            codes = {name: batch[name].to_numpy(zero_copy_only=False) for name in columns}
            for row, labels in enumerate(batch.drop_columns(columns).to_pylist()):
                found = {name: np.asarray(codes[name][row]) for name in columns}
                yield Sample(labels.pop("key"), found, labels)


def _from_tar(sample: TarSample, members: dict[str, str], columns: list[str]) -> Outcome:
    if sample.fault:
        return Rejected(sample.key, sample.fault)
    parts, codes = sample.parts, {}
    arrays = [suffix for suffix in parts if _is_array(suffix)]
    reading = ""
    try:
        for column in columns:
            reading = members.get(column, f"{column}.npy".lower())
            if reading not in parts and not members and len(columns) == len(arrays) == 1:
                reading = arrays[0]
            if reading not in parts:
                return Rejected(sample.key, f"no {reading}: there is {', '.join(parts)}")
            codes[column] = _read_array(reading, parts[reading])
        reading = "json"
        labels = json.loads(parts["json"]) if "json" in parts else {}
        if not isinstance(labels, dict):
            raise ValueError("not an object")
        reading = "cls"
        if "cls" in parts:
            labels["class_id"] = int(parts["cls"])
        reading = "txt"
        if "txt" in parts:
            labels["caption"] = parts["txt"].decode()
    except (ValueError, EOFError, RecursionError) as error:
        return Rejected(sample.key, f"unreadable {reading}: {error}")
    return Sample(str(labels.pop("key", sample.key)), codes, labels)


def _is_array(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in ("npy", "pth")


def _read_array(suffix: str, content: bytes) -> np.ndarray:
    if suffix.endswith("pth"):
        return read_pth(content)
    return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
