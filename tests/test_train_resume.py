"""A run killed anywhere and started again equals the uninterrupted one, bit for bit on the CPU."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_factory import make_store

import train_stage.train
from train_stage.preemption import EXIT_SAVED

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


def child(argv, kill_before_step, send):
    """Trains in this process; `send` this signal to itself before that step."""
    torch.set_num_threads(1)
    real = train_stage.train.training_step

    def step_or_die(run, window):
        if run.step == kill_before_step:
            os.kill(os.getpid(), send)
        return real(run, window)

    train_stage.train.training_step = step_or_die
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os._exit(train_stage.train.main(argv))


def start(argv, kill_before_step=None, send=signal.SIGKILL):
    process = FORK.Process(target=child, args=(argv, kill_before_step, send))
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
    """Again and again, in steps, in the middle of writing checkpoints, and in starting up."""
    argv, rng = arguments(store, tmp_path / "run", "experiment.save_every=1"), random.Random(0)
    for _ in range(12):
        process = start(argv)
        process.join(timeout=rng.uniform(0.05, 0.6))
        process.kill()
        process.join()
    assert run_to_end(argv) == 0
    assert outcome(tmp_path / "run") == undisturbed
    left = [path.name for path in (tmp_path / "run").iterdir()]
    assert not [name for name in left if name.startswith(".") and name != ".staging"]


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
        "unwrapped_model/model.safetensors",
        "ema_model/config.json",
        "ema_model/model.safetensors",
        "training_state.pt",
        "metadata.json",
        "config.yaml",
    }


def test_resume_choices(store, tmp_path, capfd):
    run = tmp_path / "run"
    assert run_to_end(arguments(store, run)) == 0
    with pytest.raises(SystemExit, match="checkpoints of another run"):
        train_stage.train.main(arguments(store, run, "experiment.resume_from_checkpoint=null"))
    with pytest.raises(SystemExit, match="checkpoint-12"):
        train_stage.train.main(arguments(store, run, "experiment.resume_from_checkpoint=nowhere"))
    with pytest.raises(SystemExit, match="seed was 42, is now 1"):
        train_stage.train.main(arguments(store, run, "training.seed=1"))


def launch(processes, argv, port):
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
        f"--master-port={port}", "-m", "train_stage.train", *argv,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_equal_one(store, tmp_path):
    """gloo on two CPU processes, with accumulation: the same loss curve as one process."""
    same = ["training.global_batch_size=16", "training.batch_size=4"]
    dropout = ["model.transformer.hidden_dropout=0", "model.transformer.attention_dropout=0"]
    port = 20000 + (os.getpid() + int(time.time())) % 10000
    launch(2, arguments(store, tmp_path / "two", *same, *dropout), port)
    one = arguments(store, tmp_path / "one", "training.global_batch_size=16", *dropout)
    assert run_to_end(one) == 0
    weights = [
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")
    ]
    numbers = [outcome(tmp_path / name)[1] for name in ("one", "two")]
    for ours, theirs in zip(*numbers, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)
