"""rows.parquet and skipped.parquet: written, and read against the checksums in the manifest.

Parquet's own checksums leave out the footer and the page headers: one flipped bit there can turn a
column into nulls. So the manifest has the crc32c of the footer and of every column's bytes, and a
reader fetches and checks exactly those of the columns, and of the row groups, that it wants.
"""

import hashlib
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.files import REMEDY, StoreFiles

Span = list[int]  # start, length, crc32c of these bytes
GROUP_BYTES = 2**24  # of a row group in memory, about; less than that is one group


def write_parquet(path: Path, table: pa.Table) -> dict[str, Any]:
    """Writes a table; returns what the manifest is to say of it: {"footer": Span, "columns":
    {name: [Span of every row group]}, "row_groups": [rows of each]}."""
    pq.write_table(
        table,
        path,
        row_group_size=max(1, GROUP_BYTES * len(table) // max(1, table.nbytes)),
        use_dictionary=[f.name for f in table.schema if not pa.types.is_nested(f.type)],
        compression="zstd",
        write_page_checksum=True,
    )
    content, metadata = np.memmap(path, np.uint8, "r"), pq.read_metadata(path)

    def span(start: int, length: int) -> Span:
        return [start, length, crc32c.crc32c(content[start : start + length].data)]

    columns: dict[str, list[Span]] = {name: [] for name in table.column_names}
    for group in range(metadata.num_row_groups):
        for leaf in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(leaf)
            starts = [chunk.data_page_offset, chunk.dictionary_page_offset]
            start = min((place for place in starts if place), default=0)  # 0: no such page
            for name, spans in columns.items():
                if f"{chunk.path_in_schema}.".startswith(f"{name}."):
                    spans.append(span(start, chunk.total_compressed_size))
    footer = metadata.serialized_size + 8
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    place = span(len(content) - footer, footer)
    return {"footer": place, "columns": columns, "row_groups": sizes}


def read_parquet(
    files: StoreFiles,
    folder: str,
    name: str,
    manifest: dict[str, Any],
    columns: list[str] | None,
    rows: np.ndarray | None = None,
) -> pa.Table:
    """Columns (None: all) of a Parquet file of the shard in `folder`, every byte of them checked.

    A name in `columns` that the file lacks is left out. rows: places (n,), ascending; None: all.
    Raises ValueError, naming the file, when it is not the one that was written.
    """
    path, entry = f"{folder}/{name}", manifest["files"][name]
    if "parquet" not in manifest:  # schema version 1
        content = files.read_range(path, 0, entry["bytes"])
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise _damaged(files, path)
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            known = file.schema_arrow.names
            table = file.read(None if columns is None else [c for c in columns if c in known])
            return table if rows is None else table.take(rows)
    written = manifest["parquet"][name]
    known, sizes = written["columns"], written.get("row_groups", [])  # older manifests lack it
    wanted = list(known) if columns is None else [c for c in columns if c in known]
    groups = list(range(len(sizes)))
    if rows is not None and sizes:
        groups, rows = _row_groups(np.array(sizes), rows)
    spans = [written["footer"]]
    for by_group in (known[column] for column in wanted):
        leaves = len(by_group) // max(1, len(sizes))  # spans in a group: of a struct several
        parts = [by_group[group * leaves :][:leaves] for group in groups] if sizes else [by_group]
        spans += [span for part in parts for span in part]
    found = files.read_ranges(path, [(start, length) for start, length, _ in spans])
    sparse = np.zeros(entry["bytes"], np.uint8)  # what is not filled takes no memory
    for (start, length, checksum), part in zip(spans, found, strict=True):
        if crc32c.crc32c(part) != checksum:
            part = files.read_range(path, start, length, fresh=True)  # a damaged cache, perhaps
            if crc32c.crc32c(part) != checksum:
                raise _damaged(files, path)
        sparse[start : start + length] = np.frombuffer(part, np.uint8)
    with pq.ParquetFile(pa.BufferReader(pa.py_buffer(sparse))) as file:
        table = file.read_row_groups(groups, wanted) if sizes else file.read(wanted)
        return table if rows is None else table.take(rows)


def _row_groups(sizes: np.ndarray, rows: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Places (n,) in a file -> (the row groups that hold them, their places in those alone)."""
    ends = np.cumsum(sizes)
    group = np.searchsorted(ends, rows, side="right")
    groups = np.unique(group)
    left_out = ends - sizes  # rows before each group that are not read
    left_out[groups] -= np.cumsum(sizes[groups]) - sizes[groups]
    return groups.tolist(), rows - left_out[group]


def _damaged(files: StoreFiles, path: str) -> ValueError:
    return ValueError(f"{files.url}/{path} is damaged: {REMEDY}")
