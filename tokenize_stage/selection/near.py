"""Which rows are duplicates of which: equal bytes, and perceptual hashes a few bits apart.

Two hashes within d bits, cut into m blocks, agree in at least m - d of them. So for each choice of
m - d blocks (C(m, d) of them) the hashes are sorted by these blocks, and only those that agree in
them are compared. More blocks mean more sorting and fewer comparisons; `block_count` weighs both.
Rows that are near each other, or connected by such, are one group.

Plain NumPy on one core; about 80 bytes a row at the most, 8 GB for 10^8 rows.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from math import comb

import numpy as np

from storage.progress import Progress, no_progress

BITS = 64
MIN_ONES, MAX_ONES = 8, 56  # fewer or more set bits: a plain picture, which looks like any other


def group_rows(
    image_hashes: np.ndarray,
    phashes: np.ndarray,
    distance: int | None,
    progress: Progress = no_progress,
) -> np.ndarray:
    """(n,) int64: for each row the first row of its group (itself, where it is alone).

    image_hashes: (n,) uint64. phashes: (n,) uint64, 0 where there is none. distance: bits in which
    pHashes of near duplicates may differ, 0..8; None: only equal image_hashes count.
    """
    first = _first_of_equals(image_hashes)
    if distance is None:
        return first
    ones = np.bitwise_count(phashes)
    rows = np.flatnonzero((ones >= MIN_ONES) & (ones <= MAX_ONES))
    phashes = phashes[rows]
    alike = _first_of_equals(phashes)
    is_head = alike == np.arange(len(alike))
    repeats, heads = np.flatnonzero(~is_head), np.flatnonzero(is_head)
    connect(first, rows[repeats], rows[alike[repeats]])
    heads = heads[np.argsort(phashes[heads])]
    values, owners = phashes[heads], rows[heads]
    del alike, heads, is_head, ones, phashes, repeats, rows
    for a, b in near_pairs(values, distance, progress):
        connect(first, owners[a], owners[b])
    while not np.array_equal(first, above := first[first]):
        first = above
    return first


def connect(first: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Merges the groups of the rows a[i] and b[i], in place.

    first: (n,) for each row itself or an earlier row of its group; the first one has itself.
    """
    while len(a):
        left, right = _roots(first, a), _roots(first, b)
        is_apart = left != right
        a, b, left, right = (x[is_apart] for x in (a, b, left, right))
        np.minimum.at(first, np.maximum(left, right), np.minimum(left, right))


def near_pairs(
    values: np.ndarray, distance: int, progress: Progress = no_progress
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields arrays of places (a, b) in `values` whose hashes differ in at most `distance` bits.

    values: (n,) uint64, sorted, all different. Every such pair comes at least once.
    """
    blocks = block_count(len(values), distance)
    edges = [BITS * i // blocks for i in range(blocks + 1)]
    choices = combinations(range(blocks), blocks - distance)
    for chosen in progress(choices, comb(blocks, distance)):
        rest = [i for i in range(blocks) if i not in chosen]
        order = [(edges[i], edges[i + 1]) for i in (*chosen, *rest)]
        width = sum(edges[i + 1] - edges[i] for i in chosen)
        moved = np.sort(_move_blocks(values, order))
        for a, b in _close_in_sorted(moved, width, distance):
            a, b = (np.searchsorted(values, _restore_blocks(x, order)) for x in (a, b))
            yield a, b


def block_count(rows: int, distance: int) -> int:
    """The number of blocks for which the work is least, by measured costs of 40 ns a value that is
    sorted and 25 ns a pair that is compared."""

    def work(blocks: int) -> float:
        bits = BITS * (blocks - distance) // blocks
        return comb(blocks, distance) * (3 * rows + rows**2 / 2**bits)

    return min(range(distance + 1, 2 * distance + 4), key=work)


def keep_largest(first: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """(n,) int64: the row that each row's group keeps: that of most pixels, else the first.

    first: what group_rows returns. areas: (n,) pixels of each row's image.
    """
    kept = first.copy()
    is_shared = np.bincount(first, minlength=len(first))[first] > 1
    rows = np.flatnonzero(is_shared)
    rows = rows[np.lexsort((rows, -areas[rows].astype(np.int64), first[rows]))]
    is_head = np.r_[True, first[rows][1:] != first[rows][:-1]][: len(rows)]
    kept[first[rows[is_head]]] = rows[is_head]
    return kept[first]


def _roots(first: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first row of the group of each of `rows`; shortens the way to it."""
    found = first[rows]
    while not np.array_equal(found, above := first[found]):
        found = above
    first[rows] = found
    return found


def _first_of_equals(values: np.ndarray) -> np.ndarray:
    """(n,) int64: the first row with the same value."""
    order = np.argsort(values, kind="stable")
    is_head = np.r_[True, np.diff(values[order]) != 0][: len(values)]
    first = np.empty(len(values), np.int64)
    first[order] = order[is_head][np.cumsum(is_head) - 1]
    return first


def _close_in_sorted(
    moved: np.ndarray, width: int, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of values whose upper `width` bits agree and which differ in <= `distance` bits."""
    limit = np.uint64((1 << (BITS - width)) - 1)  # of a ^ b, when the upper bits agree
    places = np.flatnonzero(moved[1:] ^ moved[:-1] <= limit)
    lag = 1
    while len(places):
        a, b = moved[places], moved[places + lag]
        is_near = np.bitwise_count(a ^ b) <= distance
        if is_near.any():
            yield a[is_near], b[is_near]
        lag += 1
        places = places[: np.searchsorted(places, len(moved) - lag)]
        places = places[moved[places] ^ moved[places + lag] <= limit]


def _move_blocks(values: np.ndarray, order: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bits of each value in another order: blocks (low, high), the first uppermost."""
    moved, top = np.zeros_like(values), BITS
    for low, high in order:
        top -= high - low
        moved |= _bits(values, low, high) << np.uint64(top)
    return moved


def _restore_blocks(moved: np.ndarray, order: Sequence[tuple[int, int]]) -> np.ndarray:
    """_move_blocks backwards."""
    values, tops = np.zeros_like(moved), np.cumsum([0, *(high - low for low, high in order)])
    for (low, _), (start, end) in zip(order, pairwise(BITS - tops), strict=True):
        values |= _bits(moved, int(end), int(start)) << np.uint64(low)
    return values


def _bits(values: np.ndarray, low: int, high: int) -> np.ndarray:
    return values >> np.uint64(low) & np.uint64((1 << (high - low)) - 1)
