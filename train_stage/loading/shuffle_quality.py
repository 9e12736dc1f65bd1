"""How well an order shuffles, measured; the table that says how wide a window to take.

    python -m train_stage.loading.shuffle_quality       # seconds

An order is given as the rows of one epoch, in turn: rows (R,) int64, a permutation of 0..R-1.
"""

import numpy as np

from train_stage.loading.order import FullOrder
from train_stage.loading.window_order import WindowOrder

ROWS, CHUNK_ROWS, CLASSES, BATCH = 1_280_000, 1024, 1000, 256
WINDOWS = (4, 16, 64, 256)
ROW_BYTES = 512  # 256 codes
ADVICE = """
A store whose rows were written in random order (unsorted) loses nothing by a small window. One
sorted by class or source has batches whose mean is off by the last column, about 1 + batch rows /
window chunks in variance: take windows of more chunks than the global batch has rows, or shuffle
fully. The loader holds up to three windows."""


def displacement(rows: np.ndarray) -> float:
    """How far a row moves from its place in the store, as a share of the store: 1/3 if uniform."""
    return float(np.abs(rows - np.arange(len(rows))).mean() / len(rows))


def neighbour_correlation(rows: np.ndarray) -> float:
    """Between the row numbers of successive rows: 0 if uniform, 1 for an unshuffled store."""
    return float(np.corrcoef(rows[:-1], rows[1:])[0, 1])


def distinct_per_batch(labels: np.ndarray, batch: int) -> float:
    """How many different labels (R,) int, such as classes or chunks, a batch has on average."""
    full = len(labels) // batch * batch
    batches = np.sort(labels[:full].reshape(-1, batch), axis=1)
    return float(1 + (batches[:, 1:] != batches[:, :-1]).sum(axis=1).mean())


def expected_distinct(labels: np.ndarray, batch: int) -> float:
    """The same in a uniform shuffle, exactly: all draws of a batch may miss a label."""
    counts, times = np.unique(np.bincount(labels), return_counts=True)
    left = len(labels) - np.arange(batch)  # rows still to draw from
    missed = np.prod(np.maximum(left - counts[:, None], 0) / left, axis=1)
    return float(times @ (1 - missed))


def longest_run(labels: np.ndarray) -> int:
    """The most successive rows with one label."""
    cuts = np.flatnonzero(labels[1:] != labels[:-1]) + 1
    return int(np.diff(cuts, prepend=0, append=len(labels)).max())


def batch_noise(values: np.ndarray, batch: int) -> float:
    """Variance of a batch's mean value, over that of uniformly drawn batches: 1 if uniform.

    values (R,): what follows the store's order, such as the row number or a class.
    """
    full = len(values) // batch * batch
    means = values[:full].reshape(-1, batch).mean(axis=1)
    rows = len(values)
    uniform = values.var() / batch * (rows - batch) / (rows - 1)
    return float(((means - values.mean()) ** 2).mean() / uniform)


def measure(rows: np.ndarray, class_ids: np.ndarray) -> list[float]:
    """The table's columns for an epoch's order; class_ids (R,) of the store's rows."""
    chunks, classes = rows // CHUNK_ROWS, class_ids[rows]
    return [
        displacement(rows),
        neighbour_correlation(rows),
        distinct_per_batch(chunks, BATCH),
        distinct_per_batch(classes, BATCH),
        longest_run(classes),
        batch_noise(classes, BATCH),
    ]


def table() -> list[tuple[str, float, list[float]]]:
    """(order, MB it holds at once, columns) for uniform draws, the full order, and windows."""
    positions = np.arange(ROWS)
    bounds = np.append(np.arange(0, ROWS, CHUNK_ROWS), ROWS)
    by_class = positions * CLASSES // ROWS
    chunks, classes = (expected_distinct(n, BATCH) for n in (positions // CHUNK_ROWS, by_class))
    whole, full = ROWS * ROW_BYTES / 1e6, FullOrder(ROWS, 0).places(positions)
    lines = [("uniform, exactly", whole, [1 / 3, 0, chunks, classes, np.nan, 1])]
    lines += [("full", whole, measure(full, by_class))]
    for width in WINDOWS:
        rows = WindowOrder(bounds, width, 0).places(positions)
        held = width * CHUNK_ROWS * ROW_BYTES / 1e6
        lines += [(f"window {width}", held, measure(rows, by_class))]
        if width == WINDOWS[0]:
            lines += [(f"window {width}, unsorted", held, measure(rows, by_class[full]))]
    return lines


def main() -> None:
    print(
        f"{ROWS:,} rows sorted by {CLASSES} classes, chunks of {CHUNK_ROWS}, batches of {BATCH}\n"
    )
    print("                     MB at              neighbour  chunks  classes  longest   noise of")
    print("order                 once  displaced  correlation  a batch  a batch     run  the mean")
    for name, held, columns in table():
        numbers = "{:10.4f} {:12.4f} {:8.1f} {:8.1f} {:7.0f} {:9.2f}".format(*columns)
        print(f"{name:20} {held:6.0f} {numbers}")
    print(ADVICE)


if __name__ == "__main__":
    main()
