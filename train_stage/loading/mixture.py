"""Several stores in one stream: which store each position takes its row from, and which row.

Every block of 65,536 positions has the same number of rows of each store, shuffled by the seed and
the block's number. So a place in any store's own stream is found at once from any position.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import fsum, inf

import numpy as np

from train_stage.loading.order import permute, runs_of

BLOCK = 65_536
ARRANGEMENT = -1  # where the keys of permute have an epoch in other modules, which never is -1


class Mixture:
    """Splits the positions of one stream among the streams of several sources."""

    def __init__(self, weights: Sequence[float], seed: int):
        """Raises ValueError for a weight that is not above 0, or gives no place in a block."""
        self.counts, self.seed = share_places(weights), seed
        self._block = lru_cache(2)(self._arrange)

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source (n,) int16 and place in that source's own stream (n,) int64; fastest ascending.

        The places of a source ascend with the positions, and none is left out.
        """
        sources = np.zeros(len(positions), np.int16)
        if len(self.counts) == 1:
            return sources, positions
        places = np.empty(len(positions), np.int64)
        for block, part in runs_of(positions, BLOCK):
            inside = positions[part] % BLOCK
            arrangement, ranks = self._block(block)
            sources[part] = arrangement[inside]
            places[part] = block * self.counts[sources[part]] + ranks[inside]
        return sources, places

    def _arrange(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources (BLOCK,) int16 of a block, and how often each came before in it."""
        sources = np.repeat(np.arange(len(self.counts), dtype=np.int16), self.counts)
        sources = sources[permute(np.arange(BLOCK), BLOCK, self.seed, ARRANGEMENT, block)]
        ranks = np.empty(BLOCK, np.int64)
        ranks[np.argsort(sources, kind="stable")] = np.concatenate(
            [np.arange(count) for count in self.counts]
        )
        return sources, ranks


def shares(
    rows: Sequence[int], weights: Sequence[float | None], repeats: Sequence[float]
) -> list[float]:
    """Each source's share of all positions, summing to 1: its weight, else rows x repeat.

    Raises ValueError when some sources have weights and others have not, or repeats beside them.
    """
    given = [weight for weight in weights if weight is not None]
    if given and (len(given) < len(weights) or any(repeat != 1 for repeat in repeats)):
        raise ValueError(
            f"a mixture takes a weight for every store, or repeats alone, but weights are "
            f"{list(weights)} and repeats {list(repeats)}"
        )
    parts = given or [count * repeat for count, repeat in zip(rows, repeats, strict=True)]
    return _normalise(parts)


def share_places(weights: Sequence[float]) -> np.ndarray:
    """How many of a block's places each source has (S,) int64, by largest remainder."""
    exact = [share * BLOCK for share in _normalise(weights)]
    counts = [int(places) for places in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: BLOCK - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        source = counts.index(0)
        least = (fsum(weights) - weights[source]) / (BLOCK - 1) * 1.01  # stays legal when rounded
        raise ValueError(
            f"weight {weights[source]:.3g} of source {source} is less than one row in {BLOCK:,} "
            f"beside {list(weights)}: give it {least:.3g} or more, or leave it out"
        )
    return np.array(counts, np.int64)


def _normalise(weights: Sequence[float]) -> list[float]:
    """The same, summing to 1."""
    total = fsum(weights)
    if not weights or not all(0 < weight <= total < inf for weight in weights):
        raise ValueError(
            f"weights (or rows x repeats) {list(weights)} must be above 0 and finite; leave out "
            "the store that should have no part"
        )
    return [weight / total for weight in weights]
