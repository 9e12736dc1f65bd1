"""Step 5: TokenLoader, batches of codes and classes from a store, in a shuffled, seekable order.

    loader = TokenLoader(TokenStore("data/imagenet"), global_batch_size=256, seed=0)
    for batch in loader: ...        # batch.codes (256, N) int64, batch.class_ids (256,) int64

The order is a pure function of (seed, position): the same global batches, bit for bit, for any
number of processes, and any step is reached at once. State: one number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.reader import TokenStore
from train_stage.order import stream_rows


@dataclass
class Batch:
    """This process's part of global batch number `step`; rows are row numbers of the store."""

    step: int
    rows: np.ndarray  # (b,) int64
    codes: Tensor  # (b, N) int64 in [0, K)
    class_ids: Tensor  # (b,) int64, -1 where the store has none


class TokenLoader:
    """Iterates for ever from `self.step`; process `rank` of `world_size` gets its slice."""

    def __init__(
        self,
        store: TokenStore,
        global_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        column: str = "codes",
        max_rows: int | None = None,
    ):
        """max_rows: use only that many rows, chosen by the seed. Everything is kept in memory.

        Raises ValueError for an empty store or a batch that the processes cannot share equally.
        """
        check_divides(global_batch_size, world_size)
        if not len(store):
            raise ValueError(f"{store.path} has no rows; run muse-tokenize first")
        self.global_batch_size, self.seed = global_batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.rows = min(len(store), max_rows or len(store))
        self.total_rows = len(store)
        self.meta, self.content = store.meta, store.content_fingerprint(column)
        self.step = 0
        self._codes = store.read_codes(slice(None), column)  # (rows, N)
        self._class_ids = store.read_column("class_id").astype(np.int64)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch(self.step)
            self.step += 1

    def batch(self, step: int) -> Batch:
        """This process's part of the global batch `step`, whatever was read before."""
        rows = self.global_rows(step)
        share = self.global_batch_size // self.world_size
        rows = rows[self.rank * share : (self.rank + 1) * share]
        codes = torch.from_numpy(self._codes[rows].astype(np.int64))
        return Batch(step, rows, codes, torch.from_numpy(self._class_ids[rows]))

    def global_rows(self, step: int) -> np.ndarray:
        """Row numbers of the whole global batch `step`: (global_batch_size,) int64."""
        first = step * self.global_batch_size
        places = stream_rows(np.arange(first, first + self.global_batch_size), self.rows, self.seed)
        if self.rows == self.total_rows:
            return places
        # a subset: the first `self.rows` places of one fixed permutation of the store
        return stream_rows(places, self.total_rows, self.seed)

    @property
    def largest_class_id(self) -> int:
        """Of all rows of the store; -1 when none has a class."""
        return int(self._class_ids.max())

    def epoch(self, step: int) -> float:
        """How many times the rows have been seen before global batch `step`."""
        return step * self.global_batch_size / self.rows

    def state_dict(self) -> dict[str, Any]:
        """The position, and what must not change for it to mean the same rows."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position, at once. Raises ValueError naming what differs."""
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"cannot go on: {name} was {state[name]}, is now {value}; use the same store, "
                    "seed and global batch size (any number of processes), or start a new run"
                )
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        return {
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "rows": self.rows,
            "content": self.content,
        }


def check_divides(global_batch_size: int, parts: int) -> None:
    """Refuses a global batch that does not divide, naming the nearest that do."""
    if global_batch_size < 1 or global_batch_size % parts:
        below = global_batch_size // parts * parts
        near = f"{below} and {below + parts}" if below else f"{parts}"
        raise ValueError(
            f"global batch of {global_batch_size} is not divisible by {parts} "
            f"(processes x accumulation steps): nearest are {near}"
        )
