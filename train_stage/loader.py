"""Step 5: TokenLoader, batches of codes and classes from stores, in a shuffled, seekable order.

    loader = TokenLoader(TokenStore("data/imagenet"), global_batch_size=256, seed=0)
    for batch in loader: ...        # batch.codes (256, N) int64, batch.class_ids (256,) int64

The order is a pure function of (seed, position): the same global batches, bit for bit, for any
number of processes, and any step is reached at once. State: one number. There are no worker
processes: a batch is one gather, planned for many batches at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.reader import TokenStore
from storage.schema import StoreMismatch
from train_stage.mixture import Mixture, shares
from train_stage.store_stream import Plan, Reading, StoreStream

PLANNED_ROWS = 16_384  # of this process: what planning costs is shared by so many rows


@dataclass(frozen=True)
class Source:
    """A store in a mixture: its share of the rows, or how often a row comes beside the others'."""

    store: TokenStore
    weight: float | None = None  # share, relative to the other weights
    repeat: float = 1.0  # without weights: epochs, relative to the other stores'
    filter: str | None = None  # storage/filters.py; rows that do not pass are left out


@dataclass
class Batch:
    """This process's part of global batch number `step`, b rows."""

    step: int
    rows: np.ndarray  # (b,) int64, row numbers of the store
    codes: Tensor  # (b, N) int64 in [0, K); uint16 from a narrow loader
    class_ids: Tensor  # (b,) int64, -1 where the store has none
    sources: np.ndarray  # (b,) which store of the mixture


@dataclass
class _Planned:
    """The batches from number `first` on: sources (n,), and of every source where and what."""

    first: int
    sources: np.ndarray
    parts: list[tuple[np.ndarray | None, Plan]]  # (places among the n; None: all, plan)


class TokenLoader:
    """Iterates for ever from `self.step`; process `rank` of `world_size` gets its slice."""

    def __init__(
        self,
        stores: TokenStore | Sequence[Source],
        global_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        reading: Reading | None = None,
        filter: str | None = None,
        max_rows: int | None = None,
        narrow: bool = False,
        device: torch.device | None = None,
        quiet: bool = True,
    ):
        """filter, max_rows: as in StoreStream, for a single store; narrow: codes as uint16, to be
        widened on the device; quiet: no progress bar while codes are loaded.

        Raises ValueError for an empty store, a batch that the processes cannot share equally, or
        stores (StoreMismatch) that do not hold the same kind of codes.
        """
        check_divides(global_batch_size, world_size)
        sources = [Source(stores, filter=filter)] if isinstance(stores, TokenStore) else stores
        reading = reading or Reading()
        check_alike([source.store for source in sources], reading.column)
        self.global_batch_size, self.seed, self.narrow = global_batch_size, seed, narrow
        self.rank, self.world_size, self.share = rank, world_size, global_batch_size // world_size
        self.streams = [
            StoreStream(s.store, reading, seed + n, s.filter, max_rows, device, quiet)
            for n, s in enumerate(sources)
        ]
        sizes = [stream.size for stream in self.streams]
        weights, repeats = [s.weight for s in sources], [s.repeat for s in sources]
        self.shares = shares(sizes, weights, repeats)
        self.mixture = Mixture(self.shares, seed)
        self.rows = sum(sizes)
        self.step = 0
        spec = sources[0].store.meta.arrays[reading.column]
        self._dtype, self._shape = np.dtype(spec.dtype), tuple(spec.shape)
        self._scratch = np.empty((self.share, *self._shape), self._dtype)
        self._planned: _Planned | None = None
        self._batches = max(1, PLANNED_ROWS // self.share)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch(self.step)
            self.step += 1

    def batch(self, step: int) -> Batch:
        """This process's part of the global batch `step`, whatever was read before."""
        planned = self._plan(step)
        first = (step - planned.first) * self.share
        if len(self.streams) > 1:
            return self._mixed(step, first, planned)
        plan, part = planned.parts[0][1], slice(first, first + self.share)
        scratch = None if self.narrow else self._scratch
        codes, class_ids = self.streams[0].read(plan, part, scratch)
        ids = torch.from_numpy(class_ids)
        return Batch(step, plan.rows[part], self._widen(codes), ids, planned.sources[part])

    def epoch(self, step: int) -> float:
        """How many times the rows have been seen before global batch `step`, on average."""
        return step * self.global_batch_size / self.rows

    @property
    def largest_class_id(self) -> int:
        """Of all rows of the stores; -1 when none has a class."""
        return max(stream.largest_class_id for stream in self.streams)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what must not change for it to mean the same rows."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any], accept_changes: bool = False) -> None:
        """Goes to a saved position, at once.

        Raises ValueError naming what differs; accept_changes goes on with the rows as they are now.
        """
        for name, value in self._identity().items():
            if state.get(name) != value and not accept_changes:
                raise ValueError(
                    f"cannot go on: {name} was {state.get(name)}, is now {value}; use the same "
                    "store, seed and global batch size (any number of processes), start a new run, "
                    "or go on with other rows than before by dataset.accept_changes=true"
                )
        self.step = state["step"]

    def _plan(self, step: int) -> _Planned:
        """What the batches around `step` hold; kept until others are asked for."""
        first = step - step % self._batches
        if self._planned is None or self._planned.first != first:
            batches = np.arange(first, first + self._batches)[:, None] * self.global_batch_size
            inside = np.arange(self.rank * self.share, (self.rank + 1) * self.share)
            sources, places = self.mixture.split((batches + inside).reshape(-1))
            parts: list[tuple[np.ndarray | None, Plan]] = []
            for number, stream in enumerate(self.streams):
                where = np.flatnonzero(sources == number) if len(self.streams) > 1 else None
                parts.append((where, stream.plan(places if where is None else places[where])))
            self._planned = _Planned(first, sources, parts)
        return self._planned

    def _mixed(self, step: int, first: int, planned: _Planned) -> Batch:
        """A batch of rows from several stores."""
        end = first + self.share
        codes = np.empty((self.share, *self._shape), self._dtype)
        rows, class_ids = np.empty(self.share, np.int64), np.empty(self.share, np.int64)
        for stream, (where, plan) in zip(self.streams, planned.parts, strict=True):
            assert where is not None
            begin, stop = np.searchsorted(where, [first, end])
            part, at = slice(int(begin), int(stop)), where[begin:stop] - first
            rows[at] = plan.rows[part]
            codes[at], class_ids[at] = stream.read(plan, part)
        sources = planned.sources[first:end]
        return Batch(step, rows, self._widen(codes), torch.from_numpy(class_ids), sources)

    def _widen(self, codes: np.ndarray | Tensor) -> Tensor:
        """To what the batch delivers; the narrow form shares memory with nothing of ours."""
        if isinstance(codes, Tensor):
            return codes if self.narrow else codes.long()
        return torch.from_numpy(codes if self.narrow else codes.astype(np.int64))

    def _identity(self) -> dict[str, Any]:
        return {
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "shares": self.shares,
            **{
                f"store {number}: {name}": value
                for number, stream in enumerate(self.streams)
                for name, value in stream.identity().items()
            },
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


def check_alike(stores: Sequence[TokenStore], column: str) -> None:
    """Raises StoreMismatch, naming the field, for stores that cannot be mixed."""
    if not stores:
        raise ValueError("a loader needs a store")
    first = stores[0]
    for store in stores:
        if column not in store.meta.arrays:
            raise StoreMismatch(f"{store.path} has no column {column!r}: {list(store.meta.arrays)}")
        for name, ours, theirs in (
            ("codes", first.meta.arrays[column], store.meta.arrays[column]),
            ("tokenizer", *(s.meta.tokenizers[column].fingerprint for s in (first, store))),
            ("class_names", *(s.meta.transform.get("class_names") for s in (first, store))),
        ):
            if ours != theirs:
                raise StoreMismatch(
                    f"{store.path} cannot be mixed with {first.path}: {name} {theirs} != {ours}"
                )
