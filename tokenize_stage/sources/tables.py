"""Tables of images: Parquet, saved Hugging Face datasets (Arrow), CSV and TSV, as input shards.

A table is divided by rows, Parquet and Arrow between their row groups or batches where these are
small enough; deterministic in the table and dataset.images_per_shard. table_rows.py reads them.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tokenize_stage.sources.class_index import ClassIndex, index_of
from tokenize_stage.sources.config import ColumnsConfig
from tokenize_stage.sources.csv_rows import csv_pieces
from tokenize_stage.sources.sample import IMAGE_SUFFIXES, InputShard, TablePart, suffix_of
from tokenize_stage.sources.stream import URL, open_arrow, open_file

TABLES = ("parquet", "pq", "arrow", "csv", "tsv")
USUAL_COLUMNS = {
    "image": "image img image_bytes jpg jpeg png webp bytes image_path path file_path filepath "
    "file_name filename image_url url",
    "caption": "caption text txt prompt",
    "class_id": "class_id label cls",
    "key": "key __key__",
}


def table_shards(
    path: str, rows_per_shard: int, chosen: ColumnsConfig, classes: ClassIndex
) -> list[InputShard]:
    """The shards STEM-00000, STEM-00001, … of a table.

    Raises ValueError for a table that cannot be read, or has no column of images.
    """
    suffix = suffix_of(path)
    try:
        if suffix in ("csv", "tsv"):
            names, pieces = csv_pieces(path, rows_per_shard)
            schema = pa.schema([(name, pa.string()) for name in names])
        else:
            schema, groups = _arrow_rows(path) if suffix == "arrow" else _parquet_rows(path)
            pieces = [(first, count, 0) for first, count in divide_rows(groups, rows_per_shard)]
    except (pa.ArrowInvalid, ImportError) as error:
        raise ValueError(f"{path} is no {suffix} table that can be read: {error}") from None
    columns = _columns(path, schema, chosen)
    classes = classes if classes.ids else index_of(_class_labels(schema, columns.get("class_id")))
    label = columns.get("class_id")
    label_ids = classes.ids if label and not pa.types.is_integer(schema.field(label).type) else {}
    stem = os.path.basename(path.partition("?")[0] if URL.match(path) else path).rpartition(".")[0]
    shards = []
    for index, (first, count, offset) in enumerate(pieces):
        part = TablePart(path, first, count, columns, label_ids, offset)
        source = f"{path}:{first}..{first + count - 1}"
        shards.append(InputShard(f"{stem}-{index:05d}", source, None, classes.names, part))
    return shards


def divide_rows(groups: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """(first, count) of at most `limit` rows each, ending where a group of rows ends if one does.

    A table without rows is one piece of none.
    """
    pieces: list[tuple[int, int]] = []
    first = count = 0
    for rows in groups:
        if count and count + rows > limit:
            pieces.append((first, count))
            first, count = first + count, 0
        count += rows
        while count > limit:
            pieces.append((first, limit))
            first, count = first + limit, count - limit
    return [*pieces, (first, count)] if count or not pieces else pieces


def tables_in(folder: str) -> list[str]:
    """The tables of a folder that is a saved Hugging Face dataset, or one of Parquet files.

    Raises ValueError for several splits: which of them is wanted cannot be known.
    """
    place = Path(folder)
    if (place / "dataset_dict.json").is_file():
        splits = json.loads((place / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{folder} has the splits {splits}; give one: {place / splits[0]}")
    if (place / "state.json").is_file():
        state = json.loads((place / "state.json").read_text())
        return [str(place / file["filename"]) for file in state["_data_files"]]
    entries = sorted(entry for entry in place.iterdir() if entry.name[0] != ".")
    folders = [entry.name for entry in entries if entry.is_dir()]
    if folders == ["data"] and (found := tables_in(str(place / "data"))):
        return found
    if folders or any(suffix_of(entry.name) in IMAGE_SUFFIXES for entry in entries):
        return []
    return [str(entry) for entry in entries if entry.suffix in (".arrow", ".parquet")]


def _parquet_rows(path: str) -> tuple[pa.Schema, list[int]]:
    with open_file(path) as opened, pq.ParquetFile(opened) as file:
        groups = range(file.metadata.num_row_groups)
        return file.schema_arrow, [file.metadata.row_group(index).num_rows for index in groups]


def _arrow_rows(path: str) -> tuple[pa.Schema, list[int]]:
    with open_arrow(path) as reader:
        return reader.schema, [batch.num_rows for batch in reader]


def _columns(path: str, schema: pa.Schema, chosen: ColumnsConfig) -> dict[str, str]:
    """What is needed -> the name of its column. Raises ValueError without images."""
    lower = {name.lower(): name for name in reversed(schema.names)}
    columns = {}
    for what, usual in USUAL_COLUMNS.items():
        name = getattr(chosen, what)
        if name is not None and name not in schema.names:
            raise ValueError(f"dataset.columns.{what}={name}: {path} has {', '.join(schema.names)}")
        found = name or next((lower[word] for word in usual.split() if word in lower), None)
        if found:
            columns[what] = found
    if "image" not in columns:
        raise ValueError(
            f"{path} has the columns {', '.join(schema.names)}: say with dataset.columns.image= "
            "which of them holds the images, their paths or their URLs"
        )
    return columns


def _class_labels(schema: pa.Schema, column: str | None) -> list[str]:
    """The names that the `datasets` library noted for a column of class numbers."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features") or {}
    return (features.get(column) or {}).get("names") or []
