"""Text states of rows, one vector a token, as a padded batch; stage two reads them here.

A table column `text_states_<name>` keeps of every row the states of its own tokens, start and end
token among them, in float16. Those of the padding are not stored: a model that trains on them must
mask all positions beyond a row's length, in training and later. (Codes are an array column and so
are text ids; states are far larger than both, and as long as their captions.)

B rows, S positions, W width of a state.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from storage.reader import TokenStore


def states_type(width: int) -> pa.DataType:
    """Of a column of states: in every row a list of vectors of `width` float16 numbers."""
    vector = pa.list_(pa.field("element", pa.float16()), width)
    return pa.large_list(pa.field("element", vector))


def states_array(states: np.ndarray, lengths: np.ndarray) -> pa.Array:
    """States (sum of lengths, W) float16, one row's after the other's -> a column of B rows."""
    kind = states_type(states.shape[1])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), type=kind.value_type)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), vectors, type=kind)


def read_text_states(
    store: TokenStore, name: str, rows: Any, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows -> states (B, S, W) float16, zeros beyond each row's length, and lengths (B,) int64.

    rows: as TokenStore.table takes them; length: S, None for the longest of these rows. Reads whole
    row groups (16 MB): ask for rows that lie together. Raises ValueError for a store without such
    states, for a row without, and for one that is longer than S.
    """
    column = store.table([f"text_states_{name}"], rows).column(0).combine_chunks()
    if column.null_count:
        raise ValueError(f"{store.path}: {column.null_count} rows have no text_states_{name}")
    lengths = np.diff(column.offsets.to_numpy())
    longest = int(lengths.max(initial=0))
    if length is not None and longest > length:
        raise ValueError(f"length={length}: a row has the states of {longest} tokens")
    vectors = column.flatten()
    states = np.zeros((len(lengths), length or longest, vectors.type.list_size), np.float16)
    places = np.arange(states.shape[1]) < lengths[:, None]  # (B, S)
    states[places] = vectors.flatten().to_numpy().reshape(-1, states.shape[2])
    return states, lengths
