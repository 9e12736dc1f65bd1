"""rows.parquet and skipped.parquet: written, and read against the checksums in the manifest.

Parquet's own checksums leave out the footer and the page headers: one flipped bit there can turn a
column into nulls. So the manifest has the crc32c of the footer and of every column's bytes, and a
reader fetches and checks exactly those of the columns that it wants.
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


def write_parquet(path: Path, table: pa.Table) -> dict[str, Any]:
    """Writes a table; returns what the manifest is to say of it: {"footer": Span, "columns":
    {name: [Span of every row group]}}."""
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
    content, metadata = np.memmap(path, np.uint8, "r"), pq.read_metadata(path)

    def span(start: int, length: int) -> Span:
        return [start, length, crc32c.crc32c(content[start : start + length].data)]

    columns: dict[str, list[Span]] = {name: [] for name in table.column_names}
    for group in range(metadata.num_row_groups):
        for leaf in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(leaf)
            starts = [chunk.data_page_offset, chunk.dictionary_page_offset]
            start = min(place for place in starts if place)  # 0: no such page
            for name, spans in columns.items():
                if f"{chunk.path_in_schema}.".startswith(f"{name}."):
                    spans.append(span(start, chunk.total_compressed_size))
    footer = metadata.serialized_size + 8
    return {"footer": span(len(content) - footer, footer), "columns": columns}


def read_parquet(
    files: StoreFiles, folder: str, name: str, manifest: dict[str, Any], columns: list[str] | None
) -> pa.Table:
    """Columns (None: all) of a Parquet file of the shard in `folder`, every byte of them checked.

    A name in `columns` that the file lacks is left out. Raises ValueError, naming the file, when it
    is not the one that was written.
    """
    path, entry = f"{folder}/{name}", manifest["files"][name]
    if "parquet" not in manifest:  # schema version 1
        content = files.read_range(path, 0, entry["bytes"])
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise _damaged(files, path)
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            known = file.schema_arrow.names
            return file.read(None if columns is None else [c for c in columns if c in known])
    known = manifest["parquet"][name]["columns"]
    wanted = list(known) if columns is None else [c for c in columns if c in known]
    spans = [manifest["parquet"][name]["footer"], *(span for c in wanted for span in known[c])]
    found = files.read_ranges(path, [(start, length) for start, length, _ in spans])
    sparse = np.zeros(entry["bytes"], np.uint8)  # what is not filled takes no memory
    for (start, length, checksum), part in zip(spans, found, strict=True):
        if crc32c.crc32c(part) != checksum:
            part = files.read_range(path, start, length, fresh=True)  # a damaged cache, perhaps
            if crc32c.crc32c(part) != checksum:
                raise _damaged(files, path)
        sparse[start : start + length] = np.frombuffer(part, np.uint8)
    with pq.ParquetFile(pa.BufferReader(pa.py_buffer(sparse))) as file:
        return file.read(wanted)


def _damaged(files: StoreFiles, path: str) -> ValueError:
    return ValueError(f"{files.url}/{path} is damaged: {REMEDY}")
