"""Which shards are this process's: every one can tell alone, so tasks need no coordination.

The number of a task comes from `task=` and `tasks=`, else from Slurm: the index in the job array
and, within one array task, the rank that srun gives; both together count as one long row of tasks.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

Shard = TypeVar("Shard")


def this_task(task: int | None, tasks: int | None, environ: Mapping[str, str]) -> tuple[int, int]:
    """(task, tasks) with 0 <= task < tasks; (0, 1) outside Slurm with nothing given.

    Raises ValueError when only one of the two is given, task is out of range, or the job array
    has gaps (its indices would not cover all shards).
    """
    if (task is None) != (tasks is None):
        raise ValueError(f"task={task} tasks={tasks}: give both or neither")
    if task is not None and tasks is not None:
        if not 0 <= task < tasks:
            raise ValueError(f"task={task} tasks={tasks}: task must be in 0..tasks-1")
        return task, tasks
    index, count = _array_index(environ)
    rank, ranks = _rank(environ)
    return index * ranks + rank, count * ranks


def share_of(shards: Sequence[Shard], task: int, tasks: int) -> list[Shard]:
    """Every tasks-th shard from `task` on: over all tasks each shard exactly once."""
    return list(shards[task::tasks])


def _array_index(environ: Mapping[str, str]) -> tuple[int, int]:
    """(index, count) of this job in its Slurm array; (0, 1) when it is in none."""
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return 0, 1
    number = int(environ["SLURM_ARRAY_TASK_ID"])
    if "SLURM_ARRAY_TASK_COUNT" not in environ:
        raise ValueError(
            "SLURM_ARRAY_TASK_ID without SLURM_ARRAY_TASK_COUNT: give task= and tasks="
        )
    count = int(environ["SLURM_ARRAY_TASK_COUNT"])
    first = int(environ.get("SLURM_ARRAY_TASK_MIN", 0))
    step = int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
    last = int(environ.get("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step))
    index, rest = divmod(number - first, step)
    if rest or not 0 <= index < count or last != first + (count - 1) * step:
        raise ValueError(
            f"job array task {number} of {count} between {first} and {last}: the array has gaps, "
            "so its tasks would not cover all shards. Submit a whole range such as "
            f"--array=0-{count - 1} (finished shards are skipped), or give task= and tasks="
        )
    return index, count


def _rank(environ: Mapping[str, str]) -> tuple[int, int]:
    """(rank, ranks) within one job step started by srun; (0, 1) outside."""
    ranks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")
    if "SLURM_PROCID" not in environ or ranks is None:
        return 0, 1
    return int(environ["SLURM_PROCID"]), int(ranks)
