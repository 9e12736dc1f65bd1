"""Array columns as an uncompressed Arrow IPC file: fixed-size lists, memory-mapped.

Rows lie one after the other from a byte offset that the manifest names, so that they are read in
place, without a copy; pyarrow, polars and duckdb open the same file.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage.files import REMEDY, StoreFiles


def write_array(path: Path, array: np.ndarray, chunk_rows: int) -> None:
    """Writes (rows, ...) as one record batch with one column, named like the file.

    `chunk_rows` has no effect on the file: rows are contiguous.
    """
    width = int(np.prod(array.shape[1:]))
    values = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), width)
    field = pa.field(path.stem, values.type, nullable=False)
    schema = pa.schema([field], metadata={"shape": json.dumps(array.shape[1:])})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([values], schema=schema))


def data_offset(path: Path) -> int:
    """At which byte of the file the first row begins. Raises ValueError for another file."""
    try:
        with pa.memory_map(str(path)) as source:
            whole = source.read_buffer()
            rows = pa.ipc.open_file(whole).get_batch(0).column(0).flatten()
            return rows.buffers()[1].address - whole.address if len(rows) else 0
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged: {error}: {REMEDY}") from None


class ArrowChunks:
    """Where the chunks of one array column lie in its file, and how they decode."""

    def __init__(self, files: StoreFiles, name: str, manifest: dict[str, Any], chunk: np.ndarray):
        """name: of the file, in the store; chunk: an array of a whole chunk's shape and dtype."""
        self.name, self.chunk, self.rows = name, chunk, manifest["rows"]
        local = files.local_path(name)
        if "offsets" in manifest:
            self.offset = manifest["offsets"][Path(name).stem]
        elif local is not None:
            self.offset = data_offset(local)  # schema version 1 did not note it
        else:
            raise ValueError(f"{files.url} is of schema version 1: muse-store convert a local copy")
        self.mapped = None  # (rows, ...) in place
        shape = (self.rows, *chunk.shape[1:])
        if local is not None and not self.rows:
            self.mapped = np.empty(shape, chunk.dtype)
        elif local is not None:
            try:
                self.mapped = np.memmap(local, chunk.dtype, "r", self.offset, shape)
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"{local} is damaged: {error}: {REMEDY}") from None

    def byte_range(self, chunk: int) -> tuple[int, int]:
        """(start, length) of a chunk."""
        first = chunk * len(self.chunk)
        rows = min(len(self.chunk), self.rows - first)
        row_bytes = self.chunk.nbytes // len(self.chunk)
        return self.offset + first * row_bytes, rows * row_bytes

    def decode(self, content: bytes | None, out: np.ndarray) -> None:
        """Fills `out`, the rows of one chunk, from its bytes."""
        assert content is not None  # every chunk of an arrow file is written
        out[:] = np.frombuffer(content, out.dtype).reshape(out.shape)
