"""The ledger of an encoding run: what every task is doing, which input shards have failed.

    STORE/work/tasks/00003-of-00064.json    one a task, rewritten while it runs
    STORE/work/failed/NAME.json             one an input shard that could not be read

What is done is not in it: a shard is done when the store has it. So the ledger may be lost, late or
deleted without harm; it is for people, `muse-tokenize status` and `only=failed`.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from storage.atomic import read_json, write_json
from tokenize_stage.pipeline.progress import Progress
from tokenize_stage.work.plan import WORK

REPORT_S = 15.0  # between two reports of a task
State = Literal["running", "finished", "stopped", "failed"]


class TaskReport:
    """Tells others from time to time how far one task is."""

    def __init__(self, store: Path, task: int, tasks: int):
        self.path = store / WORK / "tasks" / f"{task:05}-of-{tasks:05}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._about = {
            "task": task,
            "tasks": tasks,
            "host": socket.gethostname(),
            "job": _slurm_job(),
            "started": time.time(),
        }
        self._counts: dict[str, Any] = {"rows": 0, "images_per_s": 0.0, "skipped": {}, "shard": ""}
        self._next = 0.0
        self._last = (time.monotonic(), 0)  # when, and rows then: of the rate
        self._write("running")

    def update(self, progress: Progress, shard: str) -> None:
        """Reports, when the last report is old enough; `shard` is the one being written."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REPORT_S
        self._count(progress, shard)
        self._write("running")

    def close(self, state: State, progress: Progress | None = None) -> None:
        """The last report of this task."""
        if progress is not None:
            self._count(progress, "")
        self._write(state)

    def _count(self, progress: Progress, shard: str) -> None:
        now, (then, rows) = time.monotonic(), self._last
        self._counts = {
            "rows": progress.rows,
            "images_per_s": (progress.rows - rows) / max(now - then, 1e-9),
            "skipped": dict(progress.skipped),
            "shard": shard,
        }
        self._last = (now, progress.rows)

    def _write(self, state: State) -> None:
        write_json(self.path, {**self._about, **self._counts, "state": state, "time": time.time()})


def task_reports(store: Path) -> list[dict[str, Any]]:
    """The last report of every task, in the order of their numbers."""
    return [read_json(path) for path in sorted((store / WORK / "tasks").glob("*.json"))]


def record_failure(store: Path, shard: str, reason: str) -> None:
    """Notes that an input shard could not be read, for `status` and `only=failed`."""
    path = _failure(store, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"shard": shard, "reason": reason, "job": _slurm_job(), "time": time.time()})


def clear_failure(store: Path, shard: str) -> None:
    """Forgets it: the shard has been encoded since."""
    _failure(store, shard).unlink(missing_ok=True)


def failures(store: Path) -> dict[str, dict[str, Any]]:
    """The input shards that failed and have not been encoded since: name -> what record noted."""
    records = (read_json(path) for path in sorted((store / WORK / "failed").glob("*.json")))
    return {record["shard"]: record for record in records}


def _failure(store: Path, shard: str) -> Path:
    return store / WORK / "failed" / f"{shard}.json"


def _slurm_job() -> str:
    """123_4 in a job array, 123 in a job, "" outside Slurm."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID", "")
    return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job
