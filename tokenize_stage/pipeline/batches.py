"""Rows that are encoded together: as many as fit, of one input shard or of several."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tokenize_stage.pipeline.decode_ahead import Step
from tokenize_stage.pipeline.rows import Row

MAX_STEPS = 4096  # of a batch, where nearly everything is rejected


def batches(steps: Iterable[Step | None], batch_size: int) -> Iterator[list[Step]]:
    """Groups steps, in order, to batch_size rows and whatever lies between them.

    A batch has fewer rows at the end, after a None (nothing has come for a while), and where so
    much is rejected that it would take too long.
    """
    batch: list[Step] = []
    rows = 0
    for step in steps:
        if step is not None:
            batch.append(step)
            rows += isinstance(step[1], Row)
        if rows == batch_size or len(batch) >= MAX_STEPS or (step is None and batch):
            yield batch
            batch, rows = [], 0
    if batch:
        yield batch


def stacked_pixels(batch: Sequence[Step], resolutions: Sequence[int]) -> dict[int, np.ndarray]:
    """The pictures of a batch, by resolution: (n, 3, R, R) uint8; {} when it has no rows."""
    pixels = [row.picture.pixels for _, row in batch if isinstance(row, Row)]
    sizes = zip(resolutions, zip(*pixels, strict=True), strict=True) if pixels else ()
    return {resolution: np.stack(of_size) for resolution, of_size in sizes}
