"""Checkpoints: written while the run goes on, damaged, gone on from in part, by one writer."""

import json
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from store_factory import make_store
from test_train_resume import STEPS, arguments, refused, run_to_end, start

from train_stage.training import checkpoint
from train_stage.training.preemption import EXIT_REPLACED


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A run directory with checkpoint-9 and checkpoint-12, to copy."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert run_to_end(arguments(store, run)) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flip(path):
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rates(run):
    return {line["step"]: line["learning_rate"] for line in lines(run)}


FILES = ["training_state.pt", "unwrapped_model/model.safetensors", "metadata.json", "config.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_left_for_the_one_before(store, finished, run, capfd, name):
    flip(run / "checkpoint-12" / name)
    shutil.rmtree(run / "model")
    assert run_to_end(arguments(store, run), quiet=False) == 0
    said = capfd.readouterr().out
    assert re.search(rf"warning: .*{name} is damaged", said) and "going on from" in said
    assert "checkpoint-9 (step 9)" in said and (run / "checkpoint-12.damaged" / name).is_file()
    for path in ("model/model.safetensors", "checkpoint-12/unwrapped_model/model.safetensors"):
        assert (run / path).read_bytes() == (finished / path).read_bytes()


def test_when_all_are_damaged_nothing_is_moved(store, run, capfd):
    for step in (9, 12):
        (run / f"checkpoint-{step}" / "training_state.pt").unlink()
    for _ in range(2):
        assert "no checkpoint of" in refused(arguments(store, run), capfd)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-9",
    ]


def test_a_chosen_checkpoint_is_not_replaced_by_another(store, run, capfd):
    flip(run / "checkpoint-12" / "training_state.pt")
    chosen = f"experiment.resume_from_checkpoint={run / 'checkpoint-12'}"
    assert "training_state.pt is damaged" in refused(arguments(store, run, chosen), capfd)
    assert (run / "checkpoint-12").is_dir()


def test_writing_at_once_or_behind_gives_the_same(store, finished, tmp_path):
    assert run_to_end(arguments(store, tmp_path / "run", "experiment.async_checkpoint=false")) == 0
    for name in ("unwrapped_model/model.safetensors", "training_state.pt"):
        ours, theirs = (path / "checkpoint-9" / name for path in (tmp_path / "run", finished))
        if name.endswith(".pt"):
            assert str(torch.load(ours)) == str(torch.load(theirs))
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def slow_disk(seconds):
    """Makes writing slow in children that are forked later; returns what undoes it."""
    real = checkpoint.write_model

    def write_slowly(*given):
        real(*given)
        time.sleep(seconds)

    checkpoint.write_model = write_slowly
    return lambda: setattr(checkpoint, "write_model", real)


@pytest.fixture
def half_a_second_of_writing():
    undo = slow_disk(0.25)  # for each of two models
    yield
    undo()


def test_the_loop_does_not_wait_for_the_disk(store, tmp_path, capfd, half_a_second_of_writing):
    """Steps go on while a checkpoint is written; the snapshot is of its own step."""
    run = tmp_path / "run"
    argv = arguments(store, run, "experiment.save_every=6")
    assert run_to_end(argv, quiet=False) == 0
    said = capfd.readouterr().out
    assert (
        said.index("step 10/") < said.index("checkpoint-6 (training waited") < said.index("-12 (")
    )
    assert re.search(r"checkpoint-6 \(training waited 0\.\d s, written in \d+\.\d s\)", said)


def test_killed_while_writing_leaves_whole_checkpoints_only(
    store, finished, tmp_path, half_a_second_of_writing
):
    run = tmp_path / "run"
    process = start(arguments(store, run))
    while not list(run.glob(".staging/checkpoint-3.*/unwrapped_model")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not list(run.glob("checkpoint-*"))
    assert run_to_end(arguments(store, run)) == 0
    assert not (run / ".staging").exists()
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()


def test_what_the_writer_cannot_do_ends_the_run(store, tmp_path, capfd):
    """A disk that refuses: a file where a directory must be made."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".staging").write_text("in the way")
    assert run_to_end(arguments(store, run), quiet=False) == 2
    said = capfd.readouterr().err
    assert "error: checkpoint-3 of" in said and "could not be written" in said


def test_the_older_of_two_runs_stops(store, tmp_path, capfd):
    """Another process takes the directory: nothing more is written there."""
    run = tmp_path / "run"
    argv = arguments(store, run, "training.max_train_steps=100000", "experiment.save_every=50")
    older = start(argv, quiet=False)
    while not list(run.glob("checkpoint-*")):
        time.sleep(0.01)
    (run / "token").write_text("job 7, restart 1, process 1 on node2, abc")
    older.join(timeout=60)
    assert older.exitcode == EXIT_REPLACED
    assert "written by job 7, restart 1, process 1 on node2 now" in capfd.readouterr().err
    assert (run / "token").read_text().endswith("abc")


def test_the_schedule_starts_anew_once(store, run):
    """resume_lr_scheduler=false: warm-up again from the resumed step; a second resume goes on."""
    more = ["training.max_train_steps=20", "experiment.resume_lr_scheduler=false"]
    argv = arguments(store, run, *more)
    assert run_to_end(argv, kill_before_step=17) == -signal.SIGKILL
    assert run_to_end(argv) == 0
    after = rates(run)
    assert after[13] == 0.0 and after[14] == pytest.approx(1e-3)  # 3 steps of warm-up
    assert after[16] == 3e-3 > after[18] > after[20] > 0
    assert [after[step] for step in range(1, 4)] == [after[step] for step in range(13, 16)]


def test_the_optimizer_starts_anew_once(store, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    more = ["training.max_train_steps=18", "lr_scheduler.scheduler=constant"]
    anew = [*more, "experiment.dont_resume_optimizer=true"]
    assert run_to_end(arguments(store, other, *more)) == 0
    assert run_to_end(arguments(store, run, *anew), kill_before_step=16) == -signal.SIGKILL
    assert run_to_end(arguments(store, run, *anew)) == 0
    steps = [
        torch.load(folder / "checkpoint-18" / "training_state.pt")["optimizer"]["state"][0]["step"]
        for folder in (other, run)
    ]
    assert steps == [18, 6]  # of AdamW's bias correction: since the start, since step 12
    ours, theirs = (lines(folder)[12] for folder in (run, other))
    assert ours["loss"] == theirs["loss"] and ours["step"] == 13  # the same weights and batch


def test_max_train_examples_are_the_rows_that_are_used(store, finished, tmp_path):
    """32 rows are two batches an epoch."""
    run = tmp_path / "run"
    assert run_to_end(arguments(store, run, "experiment.max_train_examples=32")) == 0
    assert [line["epoch"] for line in lines(run)] == [step / 2 for step in range(1, STEPS + 1)]
    assert lines(finished)[-1]["epoch"] < 1


def test_overfit_one_batch_goes_on_with_that_batch(store, tmp_path):
    argv = arguments(store, tmp_path / "run", "training.overfit_one_batch=true")
    assert run_to_end(argv, kill_before_step=7) == -signal.SIGKILL
    assert run_to_end(argv) == 0
    whole = arguments(store, tmp_path / "whole", "training.overfit_one_batch=true")
    assert run_to_end(whole) == 0
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_checkpoint_by_minutes(store, tmp_path):
    run = tmp_path / "run"
    often = ["experiment.save_every=0", "experiment.save_every_minutes=1e-5"]
    limit = "experiment.checkpoints_total_limit=null"
    assert run_to_end(arguments(store, run, *often, limit)) == 0
    assert len(list(run.glob("checkpoint-*"))) > STEPS // 2
