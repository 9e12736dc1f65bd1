"""The plan of an encoding run: the list of its input shards, the same for all tasks.

STORE/work/plan-0001.parquet, 0002 and so on: the highest counts. Tasks divide a plan by index, so
how many tasks there are is free. `muse-tokenize plan` (make_plan.py) writes one.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import pyarrow as pa
import pyarrow.parquet as pq

from storage.atomic import atomic_file
from tokenize_stage.sources.sample import InputShard

WORK = "work"  # STORE/work: who does what; no part of the store
PLAN = re.compile(r"plan-(\d{4,})\.parquet")


class Plan(Sequence[InputShard]):
    """The input shards of a plan; each is made of its row when it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self._table = pq.read_table(path)
        self.names: list[str] = self._table["name"].to_pylist()

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> InputShard: ...
    @overload
    def __getitem__(self, index: slice) -> list[InputShard]: ...
    def __getitem__(self, index: int | slice) -> InputShard | list[InputShard]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return InputShard.from_json(json.loads(self._table["shard"][index].as_py()))


def read_plan(store: Path) -> Plan | None:
    """The newest plan of a store; None where nobody made one."""
    numbers = _numbers(store)
    return Plan(_path(store, max(numbers))) if numbers else None


def write_plan(store: Path, shards: Sequence[InputShard]) -> Path:
    """Writes the next plan atomically and returns its path."""
    path = _path(store, max(_numbers(store), default=0) + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"name": s.name, "source": s.source, "shard": json.dumps(s.to_json())} for s in shards]
    schema = pa.schema([(name, pa.string()) for name in ("name", "source", "shard")])
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")
    return path


def _numbers(store: Path) -> list[int]:
    matches = map(PLAN.fullmatch, (entry.name for entry in (store / WORK).glob("plan-*")))
    return [int(match[1]) for match in matches if match]


def _path(store: Path, number: int) -> Path:
    return store / WORK / f"plan-{number:04}.parquet"
