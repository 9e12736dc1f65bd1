"""A run killed anywhere and started again equals the uninterrupted one, bit for bit on the CPU."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from store_factory import make_store

import train_stage.train
import train_stage.training.setup_run  # noqa: F401  once, for all children that are forked
from train_stage.training import loop
from train_stage.training.preemption import EXIT_SAVED

STEPS = 12
SMALL = [
    f"training.max_train_steps={STEPS}",
    "training.batch_size=16",
    "training.use_ema=true",
    "experiment.log_every=1",
    "experiment.save_every=3",
    "optimizer.params.learning_rate=3e-3",
    "lr_scheduler.scheduler=cosine",
    "lr_scheduler.params.warmup_steps=3",
    "model.transformer.hidden_size=32",
    "model.transformer.num_attention_heads=2",
    "model.transformer.num_hidden_layers=2",
    "model.transformer.intermediate_size=64",  # dropout stays at its default, 0.1
]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


def arguments(store, run, *extra):
    return [f"dataset.train_store={store}", f"experiment.output_dir={run}", *SMALL, *extra]


def child(argv, kill_before_step, send, quiet):
    """Trains in this process; `send` this signal to itself before that step."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # what the parent may have had
    real = loop.training_step

    def step_or_die(run, window):
        if run.step == kill_before_step:
            os.kill(os.getpid(), send)
        return real(run, window)

    loop.training_step = step_or_die
    sys.stdout, sys.stderr = (open(os.devnull if quiet else n, "w", closefd=quiet) for n in (1, 2))
    code = train_stage.train.main(argv)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def start(argv, kill_before_step=None, send=signal.SIGKILL, quiet=True):
    process = FORK.Process(target=child, args=(argv, kill_before_step, send, quiet))
    process.start()
    return process


def run_to_end(argv, **options):
    process = start(argv, **options)
    process.join()
    return process.exitcode


def outcome(run):
    """Final weights as bytes, and the losses and gradient norms of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [(m["step"], m["loss"], m["grad_norm"], m["learning_rate"]) for m in lines]
    return (run / "model" / "model.safetensors").read_bytes(), numbers


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_to_end(arguments(store, run)) == 0
    weights, numbers = outcome(run)
    assert [step for step, *_ in numbers] == list(range(1, STEPS + 1))
    assert numbers[-1][1] < numbers[0][1]
    return weights, numbers


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 7, 9, 11])
def test_killed_at_a_step(store, undisturbed, tmp_path, step):
    argv = arguments(store, tmp_path / "run")
    assert run_to_end(argv, kill_before_step=step) == -signal.SIGKILL
    assert run_to_end(argv) == 0
    assert outcome(tmp_path / "run") == undisturbed


def test_killed_at_random_moments(store, undisturbed, tmp_path):
    """Again and again: in starting up, in steps, in the middle of writing checkpoints."""
    argv, rng = arguments(store, tmp_path / "run", "experiment.save_every=1"), random.Random(0)
    begun = time.monotonic()
    assert run_to_end(arguments(store, tmp_path / "timed", "experiment.save_every=1")) == 0
    whole = time.monotonic() - begun
    kept = []
    for _ in range(10):
        process = start(argv)
        process.join(timeout=rng.uniform(0.4, 1.0) * whole)
        process.kill()
        process.join()
        kept.append(len(list((tmp_path / "run").glob("checkpoint-*"))))
    assert any(kept)  # it had come as far as writing checkpoints
    assert run_to_end(argv) == 0
    assert outcome(tmp_path / "run") == undisturbed
    assert not (tmp_path / "run" / ".staging").exists()


def test_log_lines_that_span_a_kill(store, tmp_path):
    """The sums of a log line survive, too."""
    outcomes = []
    for kill in (None, 8):
        argv = arguments(store, tmp_path / f"run-{kill}", "experiment.log_every=5")
        run_to_end(argv, kill_before_step=kill)
        assert run_to_end(argv) == 0
        outcomes.append(outcome(tmp_path / f"run-{kill}"))
    assert outcomes[0] == outcomes[1] and len(outcomes[0][1]) == 4  # 1, 5, 10, 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_exit(store, undisturbed, tmp_path, number):
    argv = arguments(store, tmp_path / "run", "experiment.save_every=100")
    assert run_to_end(argv, kill_before_step=5, send=number) == EXIT_SAVED
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert run_to_end(argv) == 0
    assert outcome(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_other_optimizers_resume_too(store, tmp_path, name):
    outcomes = []
    for kill in (None, 7):
        argv = arguments(store, tmp_path / f"run-{kill}", f"optimizer.name={name}")
        run_to_end(argv, kill_before_step=kill)
        assert run_to_end(argv) == 0
        outcomes.append(outcome(tmp_path / f"run-{kill}"))
    assert outcomes[0] == outcomes[1]


def test_checkpoints_are_whole_and_limited(store, tmp_path):
    run = tmp_path / "run"
    assert run_to_end(arguments(store, run, "experiment.checkpoints_total_limit=2")) == 0
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-9",
    ]
    files = {str(p.relative_to(run / "checkpoint-9")) for p in (run / "checkpoint-9").rglob("*.*")}
    assert files == {
        "unwrapped_model/config.json",
        "unwrapped_model/codes.json",
        "ema_model/codes.json",
        "unwrapped_model/model.safetensors",
        "ema_model/config.json",
        "ema_model/model.safetensors",
        "training_state.pt",
        "metadata.json",
        "config.yaml",
    }


def refused(argv, capfd):
    """The one line of an error, with exit status 2."""
    assert train_stage.train.main(argv) == 2
    return capfd.readouterr().err.strip().splitlines()[-1]


def test_resume_choices(store, tmp_path, capfd):
    run = tmp_path / "run"
    assert run_to_end(arguments(store, run)) == 0
    again = arguments(store, run)
    resume = "experiment.resume_from_checkpoint"
    assert "checkpoints of another run" in refused([*again, f"{resume}=null"], capfd)
    assert "checkpoint-12" in refused([*again, f"{resume}=nowhere"], capfd)
    assert "seed was 42, is now 1" in refused([*again, "training.seed=1"], capfd)
    early = f"{resume}={run / 'checkpoint-9'}"
    assert "choose another experiment.output_dir" in refused([*again, early], capfd)
    branch = arguments(store, tmp_path / "branch", early)
    assert run_to_end(branch) == 0
    assert outcome(tmp_path / "branch")[0] == outcome(run)[0]


def test_changed_options_are_said_and_recorded(store, tmp_path):
    run = tmp_path / "run"
    assert run_to_end(arguments(store, run)) == 0
    more = arguments(store, run, "training.max_train_steps=14", "training.max_grad_norm=0.5")
    assert run_to_end(more) == 0
    assert "max_train_steps: 14" in (run / "config.yaml").read_text()
    assert len(outcome(run)[1]) == 14


def test_other_data_is_refused(store, tmp_path, capfd):
    assert run_to_end(arguments(store, tmp_path / "run")) == 0
    other = make_store(tmp_path, rows=300, classes=9)
    shutil.rmtree(tmp_path / "vq")
    message = refused(arguments(other, tmp_path / "run"), capfd)
    assert "cannot go on: store 0: content was" in message


def test_another_optimizer_does_not_take_its_state(store, tmp_path, capfd):
    run = tmp_path / "run"
    assert run_to_end(arguments(store, run)) == 0
    more, anew = "training.max_train_steps=14", "experiment.dont_resume_optimizer=true"
    other = arguments(store, run, more, "optimizer.name=lion")
    message = refused(other, capfd)
    assert "the state of adamw, which lion cannot go on from" in message and anew in message
    assert run_to_end([*other, anew]) == 0
    third = arguments(store, run, "training.max_train_steps=16", "optimizer.name=muon", anew)
    assert run_to_end(third) == 0  # though the option was given before
    assert run_to_end(third[:-1]) == 0  # finished, and of the same optimizer


def test_a_finished_run_says_so(store, tmp_path, capfd):
    argv = arguments(store, tmp_path / "run")
    assert run_to_end(argv) == 0
    assert "nothing is left" not in capfd.readouterr().out
    assert run_to_end(argv, quiet=False) == 0
    assert "nothing is left to train: step 12 of training.max_train_steps=12" in (
        capfd.readouterr().out
    )


def test_divergence_stops_and_spares_the_checkpoints(store, tmp_path):
    run = tmp_path / "run"
    assert run_to_end(arguments(store, run)) == 0
    wild = ["training.max_train_steps=40", "optimizer.params.learning_rate=1e30"]
    assert run_to_end(arguments(store, run, *wild, "experiment.log_every=100")) == 2
    assert (run / "checkpoint-12").is_dir() and not list(run.glob("checkpoint-[2-4]?"))


def launch(processes, argv, port):
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
        f"--master-port={port}", "-m", "train_stage.train", *argv,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_equal_one(store, tmp_path):
    """gloo on two CPU processes, with accumulation: the same loss curve as one process.

    And a run that one process began and was killed goes on with two, with the same batches.
    """
    same = ["training.global_batch_size=16", "model.transformer.hidden_dropout=0"]
    same += ["model.transformer.attention_dropout=0"]
    one, two = (arguments(store, tmp_path / name, *same) for name in ("one", "two"))
    assert run_to_end(one) == 0
    assert run_to_end(two, kill_before_step=7) == -signal.SIGKILL
    launch(2, [*two, "training.batch_size=4"], free_port())
    weights = [
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")
    ]
    numbers = [outcome(tmp_path / name)[1] for name in ("one", "two")]
    for ours, theirs in zip(*numbers, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)


def test_a_signal_to_one_of_two_stops_both(store, tmp_path):
    """Only one process gets SIGUSR1; both save at the same step."""
    run = tmp_path / "run"
    argv = arguments(store, run, "training.max_train_steps=100000", "experiment.save_every=0")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "train_stage.train", *argv],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    metrics, patience = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < patience:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGUSR1)
    assert [process.wait(timeout=60) for process in processes] == [EXIT_SAVED, EXIT_SAVED]
    assert len(list(run.glob("checkpoint-*"))) == 1
