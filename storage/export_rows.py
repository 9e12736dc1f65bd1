"""A store, or the rows of it that pass a filter -> files for other tools.

    export_rows(TokenStore("store"), Path("out"), "webdataset", parse_filter("nsfw_score < 0.1"))

webdataset  FOLDER/<shard or 000000>.tar: ROW.<array column>.npy, ROW.cls, ROW.txt (caption),
            ROW.json (all of the table that is not null); ROW is the row's number in the store.
            The same rows give the same bytes.
parquet     FOLDER/<shard or 000000>.parquet: array columns as fixed-size lists, and the table

FOLDER/export.json says of which store; written first, so that an export that was interrupted goes
on with the files that lack, and never with those of another export. storage/import_codes.py reads
both forms back.
"""

import io
import json
import tarfile
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.atomic import atomic_file, read_json, write_json
from storage.filters import Filter
from storage.fingerprint import fingerprint
from storage.progress import Progress, for_each, no_progress
from storage.reader import TokenStore
from storage.schema import TABLE_SCHEMA, StoreMeta, meta_from_json

Form = Literal["webdataset", "parquet"]
SUFFIXES = {"webdataset": "tar", "parquet": "parquet"}
ROWS_AT_ONCE = 16_384
ABOUT = "export.json"


@dataclass
class ExportSummary:
    """How many files and rows there are in all, and how many files were finished before."""

    files: int
    finished_before: int
    rows: int


def export_rows(
    store: TokenStore,
    folder: Path,
    form: Form,
    condition: Filter | None = None,
    rows_per_file: int | None = None,
    progress: Progress = no_progress,
    dry_run: bool = False,
) -> ExportSummary:
    """Writes the files that are not there yet; rows_per_file: None is one file a shard.

    Raises ValueError for a folder that holds another export, or a column JSON cannot hold.
    """
    files = plan_files(store, condition, rows_per_file)
    paths = {folder / f"{name}.{SUFFIXES[form]}": rows for name, rows in files.items()}
    contents = [store.content_fingerprint(column) for column in store.meta.arrays]
    about = {
        "store": store.meta.to_json(),
        "content": fingerprint([store.index.folders, contents]),
        "arrow_schema": b64encode(store.table(rows=[]).schema.serialize()).decode(),
        "form": form,
        "filter": condition.text if condition else None,
        "rows_per_file": rows_per_file,
    }
    todo = {path: rows for path, rows in paths.items() if not path.is_file()}
    before = read_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    differing = [name for name in about if before.get(name) != about[name]]
    if differing and (before or len(todo) < len(paths)):
        raise ValueError(
            f"{folder} holds another export's files ({differing[0]} differs): choose another folder"
        )
    summary = ExportSummary(len(paths), len(paths) - len(todo), sum(map(len, paths.values())))
    if dry_run:
        return summary
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ABOUT, about)

    def write(path: Path) -> None:
        with atomic_file(path) as temporary:
            WRITERS[form](store, todo[path], temporary)

    for_each(write, list(todo), progress)
    return summary


def plan_files(
    store: TokenStore, condition: Filter | None, rows_per_file: int | None
) -> dict[str, Sequence[int]]:
    """File name without suffix -> the numbers of its rows, ascending; without empty files."""
    rows: Any = range(len(store)) if condition is None else store.rows_where(condition)
    if rows_per_file is None:
        names, cuts = store.shards, store.numbers.bounds
        if condition is not None:
            cuts = np.searchsorted(rows, cuts)
    else:
        cuts = np.append(np.arange(0, len(rows), rows_per_file), len(rows))
        names = [f"{index:06d}" for index in range(len(cuts) - 1)]
    ends = zip(names, cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
    return {name: rows[first:end] for name, first, end in ends if first < end}


def read_export(folder: Path) -> tuple[StoreMeta, pa.Schema]:
    """Of the store that was exported: its meta, and its table columns beside TABLE_SCHEMA.

    Raises FileNotFoundError for a folder that is no export.
    """
    about = read_json(folder / ABOUT)
    schema = pa.ipc.read_schema(pa.py_buffer(b64decode(about["arrow_schema"])))
    extra = pa.schema([field for field in schema if field.name not in TABLE_SCHEMA.names])
    return meta_from_json(about["store"], str(folder)), extra


def write_tar(store: TokenStore, rows: Sequence[int], path: Path) -> None:
    """One sample a row, with the members in a fixed order, owned by nobody, of 1970."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            numbers = np.asarray(rows[first : first + ROWS_AT_ONCE])
            arrays = {column: store.read_codes(numbers, column) for column in store.meta.arrays}
            headers = {column: _npy_header(array[0]) for column, array in arrays.items()}
            for place, labels in enumerate(store.table(rows=numbers).to_pylist()):
                key = f"{numbers[place]:09d}"
                for column, array in arrays.items():
                    content = headers[column] + array[place].tobytes()
                    _add_member(tar, f"{key}.{column}.npy", content)
                for suffix, content in _label_members(labels).items():
                    _add_member(tar, f"{key}.{suffix}", content)


def write_parquet(store: TokenStore, rows: Sequence[int], path: Path) -> None:
    """A row group every ROWS_AT_ONCE rows, zstd, with page checksums."""
    schema = store.to_arrow(rows=np.asarray(rows[:1])).schema
    options = {"compression": "zstd", "write_page_checksum": True}
    with pq.ParquetWriter(path, schema, **options) as writer:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            numbers = np.asarray(rows[first : first + ROWS_AT_ONCE])
            writer.write_table(store.to_arrow(rows=numbers))


WRITERS = {"webdataset": write_tar, "parquet": write_parquet}


def _label_members(labels: dict[str, Any]) -> dict[str, bytes]:
    present = {name: value for name, value in labels.items() if value is not None}
    try:
        members = {"json": json.dumps(present, sort_keys=True).encode()}
    except TypeError as error:
        raise ValueError(f"a column is not for JSON ({error}): export to parquet") from None
    if "class_id" in present:
        members["cls"] = str(present["class_id"]).encode()
    if "caption" in present:
        members["txt"] = present["caption"].encode()
    return members


def _npy_header(row: np.ndarray) -> bytes:
    """What stands before the numbers of such a row in a .npy file."""
    file = io.BytesIO()
    np.save(file, row)
    return file.getvalue()[: -row.nbytes]


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o444
    tar.addfile(member, io.BytesIO(content))
