"""The order of rows as a pure function: no index in memory, no state but a position.

`permute` is a keyed bijection of [0, size): a Feistel network over a rectangle just larger than
`size`, walked until it falls inside (Black & Rogaway 2002). Any position of any epoch costs the
same, so a run may start anywhere; the order does not depend on how many processes read it.

Compiled (compiled_loops.py) it is several times faster than with numpy, and no different.
"""

from collections.abc import Iterator

import numpy as np

from train_stage.loading.compiled_loops import compile_loops

LARGEST = 2**62
BLOCK = 8192  # indices worked on at a time, so that they stay in the nearest caches
_WORD = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of splitmix64
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MIX32 = (np.uint32(0x7FEB352D), np.uint32(0x846CA68B))  # lowbias32 (C. Wellons, public domain)


class FullOrder:
    """The endless stream of epochs over `size` rows, each epoch a fresh permutation of them.

    Position p is place p % size of epoch p // size: every row comes once an epoch, and nothing is
    dropped where an epoch does not divide into batches.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Rows (n,) int64 in [0, size) at positions (n,) of the stream; fastest ascending."""
        parts = [
            _walk(positions[part] - epoch * self.size, self.size, self.seed, epoch)
            for epoch, part in runs_of(positions, self.size)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([positions[:0], *parts])


def permute(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where each index goes in the permutation of [0, size) named by `key`: int64, same shape.

    Raises ValueError for an index outside [0, size), or a size outside [1, 2^62].
    """
    if not 1 <= size <= LARGEST:
        raise ValueError(f"cannot permute {size} rows, only 1 to {LARGEST}")
    index = np.asarray(index, np.int64)
    flat = np.require(index, requirements=["C", "A", "W"]).reshape(-1)  # as compiled for
    if len(flat) and not 0 <= flat.min() <= flat.max() < size:
        raise ValueError(f"index {flat.min()} to {flat.max()} in a permutation of [0, {size})")
    return _walk(flat, size, *key).reshape(index.shape)


def _walk(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """`permute` of a contiguous index (n,) known to be inside."""
    width = max(1, (size - 1).bit_length() // 2)
    height = -(-size >> width)
    rounds = max(6, 2 * -(-16 // width))  # the fewer bits a round moves, the more rounds
    keys = hash_array(hash_words(*key) + np.arange(rounds, dtype=np.uint64)).astype(np.uint32)
    result = _permute_rectangle(index, width, height, keys)
    while len(result) and result.max() >= size:
        outside = np.flatnonzero(result >= size)
        result[outside] = _permute_rectangle(result[outside], width, height, keys)
    return result


def runs_of(positions: np.ndarray, size: int) -> Iterator[tuple[int, slice]]:
    """runs(positions // size), without a division each where all lie in one epoch (or block)."""
    if len(positions) and (first := int(positions.min()) // size) == int(positions.max()) // size:
        return iter([(first, slice(0, len(positions)))])
    return runs(positions // size)


def runs(labels: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(label, where) of every run of equal neighbours in labels (n,), in order."""
    cuts = (np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist()
    for begin, end in zip([0, *cuts], [*cuts, len(labels)], strict=True):
        if end > begin:
            yield int(labels[begin]), slice(begin, end)


def hash_words(*words: int) -> np.uint64:
    """A 64-bit hash of integers (splitmix64 chained); seeds generators and permutation keys."""
    state = 0
    for word in words:
        state = ((state ^ word & _WORD) + _STEP) & _WORD
        state = (state ^ state >> 30) * _MIX[0] & _WORD
        state = (state ^ state >> 27) * _MIX[1] & _WORD
        state ^= state >> 31
    return np.uint64(state)


def hash_array(values: np.ndarray) -> np.ndarray:
    """`hash_words` of every value alone: uint64, same shape."""
    values = values + np.uint64(_STEP)
    values = (values ^ values >> np.uint64(30)) * np.uint64(_MIX[0])
    values = (values ^ values >> np.uint64(27)) * np.uint64(_MIX[1])
    return values ^ values >> np.uint64(31)


def _network(index: np.ndarray, width: int, height: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, height x 2^width): an index is a row and a column of that rectangle.

    Rounds take turns: the row moves on by a hash of the column (modulo height), then bits of the
    column flip by a hash of the row. At most a share 2^width / size ends outside [0, size).
    """
    result = np.empty_like(index)
    for first in range(0, len(index), BLOCK):
        part = index[first : first + BLOCK]
        row = (part >> width).astype(np.uint32)
        column = (part & ((1 << width) - 1)).astype(np.uint32)
        for key in range(0, len(keys), 2):
            moves = _mix(column, keys[key]).astype(np.uint64)
            moves *= np.uint64(height)
            moves >>= np.uint64(32)  # in [0, height)
            row += moves.astype(np.uint32)
            np.minimum(row, row - np.uint32(height), out=row)  # what would be < 0 wraps to large
            column ^= _mix(row, keys[key + 1]) >> np.uint32(32 - width)
        result[first : first + BLOCK] = (row.astype(np.int64) << width) | column
    return result


def _mix(value: np.ndarray, key: np.uint32) -> np.ndarray:
    """A 32-bit hash, best in its high bits."""
    value = value ^ key
    value *= _MIX32[0]
    value ^= value >> np.uint32(15)
    value *= _MIX32[1]
    return value


def _loops(index: np.ndarray, width: int, height: int, keys: np.ndarray) -> np.ndarray:
    """`_network` as the loops that a compiler turns into vector instructions."""
    result = np.empty_like(index)
    row, column = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    low, high = np.int64((1 << width) - 1), np.uint32(32 - width)
    for first in range(0, len(index), BLOCK):
        part, done = index[first : first + BLOCK], result[first : first + BLOCK]
        for i in range(len(part)):
            row[i], column[i] = np.uint32(part[i] >> width), np.uint32(part[i] & low)
        for k in range(0, len(keys), 2):
            for i in range(len(part)):
                mixed = np.uint32((column[i] ^ keys[k]) * _MIX32[0])
                mixed = np.uint32((mixed ^ mixed >> np.uint32(15)) * _MIX32[1])
                moved = np.uint32(row[i] + (np.uint64(mixed) * np.uint64(height) >> np.uint64(32)))
                row[i] = min(moved, np.uint32(moved - height))
                mixed = np.uint32((row[i] ^ keys[k + 1]) * _MIX32[0])
                mixed = np.uint32((mixed ^ mixed >> np.uint32(15)) * _MIX32[1])
                column[i] ^= np.uint32(mixed >> high)
        for i in range(len(part)):
            done[i] = (np.int64(row[i]) << width) | np.int64(column[i])
    return result


_permute_rectangle = compile_loops(_loops, _network, "i8[::1](i8[::1], i8, i8, u4[::1])")
