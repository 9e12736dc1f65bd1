"""Signals at any moment, and kills: what is left behind goes on to the same end.

MUSE_KILLS=20 kills the run of two processes so often (3 times otherwise); with --timeout=900.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from store_factory import make_store
from test_train_checkpoints import lines, slow_disk
from test_train_resume import (
    FORK,
    arguments,
    child,
    free_port,
    outcome,
    run_to_end,
    start,
)

from train_stage.training import loop
from train_stage.training.preemption import EXIT_SAVED

KILLS = int(os.environ.get("MUSE_KILLS", 3))
STILL = [  # what makes any number of processes, and any number of parts, the same run
    "model.transformer.hidden_dropout=0",
    "model.transformer.attention_dropout=0",
    "training.global_batch_size=16",
    "lr_scheduler.scheduler=constant_with_warmup",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_to_end(arguments(store, run)) == 0
    return outcome(run)


def is_listening(process):
    """True when a process handles SIGUSR1."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1


@pytest.mark.parametrize("later_s", [0.0, 1.0])
def test_a_signal_while_torch_is_imported(tmp_path, later_s):
    argv = ["experiment.output_dir=" + str(tmp_path / "run"), "dataset.train_store=nowhere"]
    root, began = Path(__file__).parents[1], time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "train_stage.train", *argv], cwd=root, stderr=subprocess.PIPE
    )
    while not is_listening(process):
        assert time.monotonic() - began < 60
        time.sleep(0.01)
    time.sleep(later_s)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == EXIT_SAVED and "before the first step" in said
    assert not (tmp_path / "run").exists()


def member(rank, port, argv):
    """One of two processes; see `child`."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ours.items()}
    child(argv, None, None, quiet=False)


def pair(argv, ranks=(0, 1)):
    port = free_port()
    processes = [FORK.Process(target=member, args=(rank, port, argv)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def codes(processes):
    """Exit codes; when one fails, the others get no longer than srun would give them."""
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            for process in processes:
                process.join(timeout=5)
                process.kill()
        for process in processes:
            process.join(timeout=0.02)
    return [process.exitcode for process in processes]


def test_a_signal_while_waiting_for_the_other_process(store, tmp_path):
    """The main thread is in C++ then, where no Python handler runs."""
    (lonely,) = pair(arguments(store, tmp_path / "run"), ranks=[0])
    time.sleep(2)
    began = time.monotonic()
    os.kill(lonely.pid, signal.SIGTERM)
    lonely.join(timeout=30)
    assert lonely.exitcode == EXIT_SAVED and time.monotonic() - began < 2
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_signals_while_a_checkpoint_is_written(store, undisturbed, tmp_path):
    """Two of them: that checkpoint is finished, and another one is made."""
    run = tmp_path / "run"
    undo = slow_disk(0.25)
    process = start(arguments(store, run, "experiment.save_every=3"))
    undo()
    while not list(run.glob(".staging/checkpoint-3.*/unwrapped_model")):
        time.sleep(0.01)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(process.pid, number)
    process.join(timeout=60)
    assert process.exitcode == EXIT_SAVED
    first, second = sorted(path.name for path in run.glob("checkpoint-*"))
    assert first == "checkpoint-3" and not (run / ".staging").exists()
    assert run_to_end(arguments(store, run)) == 0
    assert outcome(run) == undisturbed


def hook(monkeypatch, name, at_step, before):
    """Calls `before` ahead of loop.`name` at that step, in children that are forked later."""
    real = getattr(loop, name)

    def hooked(run, *given):
        if run.step == at_step:
            before()
        return real(run, *given)

    monkeypatch.setattr(loop, name, hooked)


@pytest.mark.parametrize(
    ("name", "step", "saved", "code"),
    [("look", 4, 5, EXIT_SAVED), ("training_step", 11, 12, 0), ("save_final", 12, 12, 0)],
)
def test_a_signal_during_validation_or_near_the_end(
    store, undisturbed, tmp_path, monkeypatch, name, step, saved, code
):
    """A run whose last step is done has finished, whatever came in it."""
    argv = arguments(store, tmp_path / "run", "experiment.save_every=100")
    with monkeypatch.context() as patch:
        hook(patch, name, step, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert run_to_end(argv) == code
    found = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert found == [f"checkpoint-{saved}"]
    assert run_to_end(argv) == 0
    assert outcome(tmp_path / "run") == undisturbed


def test_a_step_that_hangs_is_left_in_time(store, tmp_path, monkeypatch):
    def hang():
        os.kill(os.getpid(), signal.SIGTERM)
        torch.ones(1).repeat(3)  # the handler has run
        time.sleep(60)

    hook(monkeypatch, "training_step", 7, hang)
    began = time.monotonic()
    assert run_to_end(arguments(store, tmp_path / "run", "experiment.grace_s=1")) == EXIT_SAVED
    assert time.monotonic() - began < 30
    assert (tmp_path / "run" / "checkpoint-6").is_dir()


def wait_for_steps(run, number):
    """Until the process that has just been started has taken so many steps."""
    token, metrics = run / "token", run / "metrics.jsonl"
    before, patience = token.read_text() if token.is_file() else "", time.monotonic() + 60
    while not token.is_file() or token.read_text() == before:
        assert time.monotonic() < patience
        time.sleep(0.002)
    until = metrics.read_text().count("\n") + number
    while metrics.read_text().count("\n") < until:
        assert time.monotonic() < patience
        time.sleep(0.002)


def test_two_processes_killed_again_and_again(store, tmp_path):
    """SIGKILL and SIGUSR1, to one or both, while starting or in steps: the same, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["training.batch_size=8", "experiment.save_every=5"]
    options += [f"training.max_train_steps={20 * (KILLS + 1)}"]
    assert codes(pair(arguments(store, whole, *options))) == [0, 0]
    seen, rng = [], random.Random(KILLS)
    for _ in range(KILLS):
        processes = pair(arguments(store, killed, *options))
        number = rng.choice([signal.SIGKILL, signal.SIGUSR1])
        victims = rng.choice([processes, processes[:1], processes[1:]])
        further = max(0, rng.randrange(-4, 18))  # steps; 0: while starting
        if further:
            wait_for_steps(killed, further)
        time.sleep(rng.uniform(0, 0.05 if further else 1.5))
        for victim in victims:
            os.kill(victim.pid, number)
        ended = codes(processes)
        assert ended != [0, 0]
        if number == signal.SIGUSR1 and victims == processes:
            assert ended == [EXIT_SAVED, EXIT_SAVED]
        seen.append((number.name, len(victims), f"after {further} steps", ended))
    print(*seen, sep="\n")
    assert codes(pair(arguments(store, killed, *options))) == [0, 0]
    assert outcome(killed) == outcome(whole)


def test_two_then_one_then_two_processes(store, tmp_path):
    """The same global batches whatever the number: the same losses as one process throughout."""
    assert run_to_end(arguments(store, tmp_path / "one", *STILL)) == 0
    mixed = tmp_path / "mixed"
    for steps, processes in ((4, 2), (8, 1), (12, 2)):
        argv = arguments(store, mixed, *STILL, f"training.max_train_steps={steps}")
        if processes == 2:
            assert codes(pair(argv)) == [0, 0]
        else:
            assert run_to_end(argv) == 0
    losses = [[line["loss"] for line in lines(run)] for run in (tmp_path / "one", mixed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_sharded_runs_resume_too(store, tmp_path, kind):
    """FSDP in two parts: the same weights as in one, and the losses of one process."""
    fsdp = [*STILL, "training.parallel=fsdp", f"training.fsdp.checkpoints={kind}"]
    one, whole, parts = (tmp_path / name for name in ("one", "whole", "parts"))
    assert run_to_end(arguments(store, one, *STILL)) == 0
    assert codes(pair(arguments(store, whole, *fsdp))) == [0, 0]
    for steps in (7, 12):
        argv = arguments(store, parts, *fsdp, f"training.max_train_steps={steps}")
        assert codes(pair(argv)) == [0, 0]
    assert outcome(parts) == outcome(whole)
    assert (parts / "checkpoint-12" / "shards").is_dir() == (kind == "sharded")
    losses = [[line["loss"] for line in lines(run)] for run in (one, whole)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    if kind == "sharded":  # one process goes on with them
        argv = arguments(store, parts, *STILL, "training.max_train_steps=14")
        assert run_to_end(argv) == 0
