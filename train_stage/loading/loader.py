"""Step 5: TokenLoader, batches of codes and classes from stores, in a shuffled, seekable order.

    loader = TokenLoader(TokenStore("data/imagenet"), global_batch_size=256, seed=0)
    for batch in loader: ...        # batch.codes (256, N) int64, batch.class_ids (256,) int64

The order is a pure function of (seed, position): the same global batches, bit for bit, for any
number of processes, and any step is reached at once. State: one number. There are no worker
processes: a batch is one gather, planned for many batches at a time.

position --mixture--> store and place --store_stream: order, views, filter--> row --rows_in_memory,
rows_in_place or rows_in_window--> codes
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.reader import TokenStore
from storage.schema import StoreMismatch
from train_stage.loading.columns import check_columns
from train_stage.loading.mixture import Mixture, shares
from train_stage.loading.store_stream import Plan, Reading, StoreStream

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
    columns: dict[str, Tensor] = field(default_factory=dict)  # (b, ...) those that were asked for


@dataclass
class _Planned:
    """The batches from number `first` up to `end`.

    ready: of every batch its rows, the index of its codes and of those after it, and class ids;
    None where there are windows or several stores.
    """

    first: int
    end: int
    sources: np.ndarray  # (n,)
    parts: list[tuple[np.ndarray | None, Plan]]  # of every store: where in the n (None: all), what
    ready: list[tuple[np.ndarray, np.ndarray, Tensor]] | None


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
        columns: Sequence[str] = (),
    ):
        """filter, max_rows: as in StoreStream, for a single store; narrow: codes as uint16, to be
        widened on the device; quiet: no progress bar while codes are loaded; columns: of the
        stores, for Batch.columns: arrays as they are stored, numbers (b,) as float32 with NaN for
        null, text_states_NAME (b, S, W) float16 with text_length_NAME (b,) int64.

        Raises ValueError for an empty store, a batch that the processes cannot share equally, or
        stores (StoreMismatch) that do not hold the same kind of codes or lack a column.
        """
        check_divides(global_batch_size, world_size)
        sources = [Source(stores, filter=filter)] if isinstance(stores, TokenStore) else stores
        reading = reading or Reading()
        check_alike([source.store for source in sources], reading.column)
        self.columns = check_columns([source.store for source in sources], columns)
        if len(sources) > 1 and reading.preload == "gpu":
            raise ValueError("preload=gpu takes one store, not a mixture: preload=ram or none do")
        self.global_batch_size, self.seed, self.narrow = global_batch_size, seed, narrow
        self.rank, self.world_size, self.share = rank, world_size, global_batch_size // world_size
        self.streams = [
            StoreStream(s.store, reading, seed + n, s.filter, max_rows, device, quiet, self.columns)
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
        scratch = np.empty((self.share, *self._shape), self._dtype)
        self._scratch = None if narrow else scratch  # what is widened afterwards
        self._gather = self.streams[0].gather
        self._first_source = np.zeros(self.share, np.int16)
        self._planned: _Planned | None = None
        self._batches = max(1, PLANNED_ROWS // self.share)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch(self.step)
            self.step += 1

    def batch(self, step: int) -> Batch:
        """This process's part of the global batch `step`, whatever was read before."""
        planned = self._planned
        if planned is None or not planned.first <= step < planned.end:
            planned = self._planned = self._plan(step)
        if planned.ready is not None:  # as little as can be: this is all that a batch costs
            rows, index, class_ids = planned.ready[step - planned.first]
            codes = self._gather(index, self.share, self._scratch)
            columns = self._take(planned, step) if self.columns else {}
            return Batch(step, rows, self._widen(codes), class_ids, self._first_source, columns)
        part = self._part(planned, step)
        rows, codes, ids, found = self._assemble(planned, part)
        sources, columns = planned.sources[part], tensors(found)
        return Batch(step, rows, self._widen(codes), torch.from_numpy(ids), sources, columns)

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
        """What the batches around `step` hold."""
        first = step - step % self._batches
        end = first + self._batches
        starts = np.arange(first, end)[:, None] * self.global_batch_size
        inside = np.arange(self.rank * self.share, (self.rank + 1) * self.share)
        sources, places = self.mixture.split((starts + inside).reshape(-1))
        if len(self.streams) > 1:
            found = [np.flatnonzero(sources == number) for number in range(len(self.streams))]
            plans = [s.plan(places[where]) for s, where in zip(self.streams, found, strict=True)]
            return _Planned(first, end, sources, list(zip(found, plans, strict=True)), None)
        plan, ready = self.streams[0].plan(places), None
        if plan.class_ids is not None:
            rows, ids = (part.reshape(-1, self.share) for part in (plan.rows, plan.class_ids))
            index = [plan.index[begin:] for begin in range(0, len(places), self.share)]
            ready = list(zip(rows, index, torch.from_numpy(ids).unbind(), strict=True))
        return _Planned(first, end, sources, [(None, plan)], ready)

    def _part(self, planned: _Planned, step: int) -> slice:
        """Where among what is planned batch number `step` stands."""
        begin = (step - planned.first) * self.share
        return slice(begin, begin + self.share)

    def _take(self, planned: _Planned, step: int) -> dict[str, Tensor]:
        """The columns of a batch of one store without windows."""
        (_, plan), part = planned.parts[0], self._part(planned, step)
        return tensors(self.streams[0].take(plan.picks[part]))

    def _assemble(
        self, planned: _Planned, part: slice
    ) -> tuple[np.ndarray, np.ndarray | Tensor, np.ndarray, dict[str, np.ndarray]]:
        """Rows (b,), codes (b, N), class ids (b,) and columns of a part of what is planned."""
        where, plan = planned.parts[0]
        if where is None:
            return plan.rows[part], *self.streams[0].read(plan, part, self._scratch)
        rows, ids = np.empty(self.share, np.int64), np.empty(self.share, np.int64)
        codes = np.empty((self.share, *self._shape), self._dtype)
        columns: dict[str, np.ndarray] = {}
        for stream, (where, plan) in zip(self.streams, planned.parts, strict=True):
            assert where is not None
            begin, end = np.searchsorted(where, [part.start, part.stop])
            inside, at = slice(int(begin), int(end)), where[begin:end] - part.start
            rows[at] = plan.rows[inside]
            codes[at], ids[at], found = stream.read(plan, inside)
            for name, values in found.items():
                if name not in columns:
                    columns[name] = np.empty((self.share, *values.shape[1:]), values.dtype)
                columns[name][at] = values
        return rows, codes, ids, columns

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


def tensors(columns: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The same memory as tensors."""
    return {name: torch.from_numpy(values) for name, values in columns.items()}


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
