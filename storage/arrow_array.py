"""Array columns as an uncompressed Arrow IPC file: fixed-size lists, memory-mapped.

Rows are read in place, without a copy; pyarrow, polars and duckdb open the same file.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa


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


def read_array(path: Path) -> np.ndarray:
    """All rows as a read-only view of the mapped file. Raises ValueError when it is no IPC file."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        values = reader.get_batch(0).column(0).flatten()
        shape = json.loads(reader.schema.metadata[b"shape"])
    except (pa.ArrowInvalid, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return values.to_numpy(zero_copy_only=True).reshape(-1, *shape)
