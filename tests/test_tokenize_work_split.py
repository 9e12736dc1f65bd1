"""Every task finds its share alone; together they have all shards, each once."""

import pytest

from tokenize_stage.work.work_split import share_of, this_task


def slurm(array: tuple[int, int, int, int, int] | None, rank: tuple[int, int] | None) -> dict:
    """Environment of one process: array = (id, count, min, max, step), rank = (procid, ntasks)."""
    names = ["ID", "COUNT", "MIN", "MAX", "STEP"]
    environ = {f"SLURM_ARRAY_TASK_{n}": str(v) for n, v in zip(names, array or (), strict=False)}
    if rank:
        environ |= {"SLURM_PROCID": str(rank[0]), "SLURM_STEP_NUM_TASKS": str(rank[1])}
    return environ


@pytest.mark.parametrize("count", [0, 1, 5, 17])
@pytest.mark.parametrize("tasks", [1, 2, 3, 20])
def test_shares_are_disjoint_and_cover_everything(count: int, tasks: int) -> None:
    shards = [f"{i:03}" for i in range(count)]
    shares = [share_of(shards, task, tasks) for task in range(tasks)]
    assert sorted(shard for share in shares for shard in share) == shards
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    "first, last, step, ranks", [(0, 0, 1, 1), (0, 7, 1, 1), (3, 9, 1, 2), (1, 10, 3, 4)]
)
def test_array_tasks_and_ranks_within_them_count_as_one_row(
    first: int, last: int, step: int, ranks: int
) -> None:
    numbers = range(first, last + 1, step)
    found = [
        this_task(None, None, slurm((n, len(numbers), first, numbers[-1], step), (rank, ranks)))
        for n in numbers
        for rank in range(ranks)
    ]
    tasks = len(numbers) * ranks
    assert found == [(task, tasks) for task in range(tasks)]


def test_the_command_line_wins_over_slurm_and_nothing_means_one_task() -> None:
    assert this_task(1, 3, slurm((5, 8, 0, 7, 1), (0, 1))) == (1, 3)
    assert this_task(None, None, {}) == (0, 1)
    assert this_task(None, None, {"SLURM_NTASKS": "8"}) == (0, 1)  # a shell in an allocation
    assert this_task(None, None, {"SLURM_PROCID": "2", "SLURM_NTASKS": "8"}) == (2, 8)


def test_the_job_step_has_the_last_word_on_the_number_of_ranks() -> None:
    environ = {"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}
    assert this_task(None, None, environ) == (1, 2)


@pytest.mark.parametrize("task, tasks", [(0, None), (None, 4), (4, 4), (-1, 4), (0, 0)])
def test_half_given_or_impossible_tasks_are_errors(task: int | None, tasks: int | None) -> None:
    with pytest.raises(ValueError, match=f"task={task} tasks={tasks}"):
        this_task(task, tasks, {})


@pytest.mark.parametrize("array", [(1, 3, 1, 9, 1), (3, 3, 1, 9, 1), (9, 3, 1, 9, 1)])
def test_an_array_with_gaps_is_an_error_in_every_task(array: tuple) -> None:
    with pytest.raises(ValueError, match="the array has gaps.*--array=0-2"):
        this_task(None, None, slurm(array, None))


def test_gaps_are_seen_without_the_limits_of_the_array_too() -> None:
    with pytest.raises(ValueError, match="gaps"):
        this_task(None, None, {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3"})
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_COUNT"):
        this_task(None, None, {"SLURM_ARRAY_TASK_ID": "7"})
