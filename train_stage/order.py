"""The order of rows as a pure function: no index in memory, no state but a position.

`permute` is a keyed bijection of [0, size): a Feistel network over the next power of two, walked
until it falls inside (Black & Rogaway 2002). Any position of any epoch costs the same, so a run
may start anywhere; the order does not depend on how many processes read it.
"""

from typing import Any

import numpy as np

ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the step of splitmix64
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def permute(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where each index goes in the permutation of [0, size) named by `key`: int64, same shape.

    Raises ValueError for an index outside [0, size).
    """
    index = np.asarray(index, dtype=np.uint64)
    if size < 1 or (index.size and int(index.max()) >= size):
        raise ValueError(f"index up to {index.max()} in a permutation of {size}")
    bits = max(2, (size - 1).bit_length())
    keys = [hash_words(*key, round_) for round_ in range(ROUNDS)]
    result = _feistel(index, bits, keys)
    outside = result >= size
    while outside.any():
        result[outside] = _feistel(result[outside], bits, keys)
        outside = result >= size
    return result.astype(np.int64)


def stream_rows(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Rows at positions of the endless stream of epochs, each a fresh permutation of the store.

    Position p is place p % size of epoch p // size: every row comes once an epoch, and nothing is
    dropped where an epoch does not divide into batches.
    """
    positions = np.asarray(positions, dtype=np.int64)
    rows = np.empty_like(positions)
    for epoch in np.unique(positions // size):
        inside = positions // size == epoch
        rows[inside] = permute(positions[inside] % size, size, seed, int(epoch))
    return rows


def hash_words(*words: int) -> np.uint64:
    """A 64-bit hash of integers (splitmix64 chained); seeds generators and permutation keys."""
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in words:
            state = _splitmix(state ^ np.uint64(word & 0xFFFFFFFFFFFFFFFF))
    return state


def _splitmix(value: Any) -> Any:
    """splitmix64's step on a uint64 or an array of them."""
    value = value + _ODD
    value = (value ^ (value >> np.uint64(30))) * _MIX[0]
    value = (value ^ (value >> np.uint64(27))) * _MIX[1]
    return value ^ (value >> np.uint64(31))


def _feistel(value: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """Unbalanced network on `bits` bits: each round swaps the halves and mixes one of them."""
    low = bits // 2
    high = bits - low
    with np.errstate(over="ignore"):
        for key in keys:
            mask = np.uint64((1 << high) - 1)
            left, right = value >> np.uint64(low), value & np.uint64((1 << low) - 1)
            left = (left ^ _splitmix(right ^ key)) & mask
            value = (right << np.uint64(high)) | left
            low, high = high, low
    return value
