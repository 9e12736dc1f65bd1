"""Two processes (gloo, CPU) train what one does, whole or in shards, and go on from each other."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_factory import make_store
from two_processes import run_all

from train_stage.train import main

ROOT = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")
SMALL = [
    "training.max_train_steps=4",
    "training.global_batch_size=32",
    "training.gradient_accumulation_steps=2",
    "training.use_ema=true",
    "experiment.log_every=1",
    "experiment.eval_every=4",
    "experiment.save_every=2",
    "optimizer.params.learning_rate=3e-3",
    "lr_scheduler.scheduler=cosine",
    "lr_scheduler.params.warmup_steps=2",
    "model.transformer.hidden_size=48",
    "model.transformer.num_attention_heads=2",
    "model.transformer.num_hidden_layers=2",
    "model.transformer.intermediate_size=67",  # does not halve
    "model.transformer.hidden_dropout=0",  # dropout depends on the process
    "model.transformer.attention_dropout=0",
]
FSDP = "training.parallel=fsdp"
NUMBERS = ["loss", "grad_norm", "eval_loss", "eval_loss_ema"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    train, other = make_store(folder / "train"), make_store(folder / "other", rows=64)
    return [f"dataset.train_store={train}", f"dataset.eval_store={other}"]


def arguments(stores, run, *extra):
    return [*stores, f"experiment.output_dir={run}", *SMALL, *extra]


def silently(runs):
    sys.stdout = open(os.devnull, "w")
    run_all(runs)


def in_one_process(runs):
    process = FORK.Process(target=silently, args=(runs,))
    process.start()
    process.join()
    assert process.exitcode == 0


def in_two_processes(runs, folder):
    """By accelerate launch (test_train_resume.py has torchrun); --cpu starts one process only."""
    (folder / "runs.json").write_text(json.dumps(runs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
        "--num_machines=1", "--mixed_precision=no", "--num_cpu_threads_per_process=1",
        "--dynamo_backend=no", f"--main_process_port={port}",
        str(ROOT / "tests" / "two_processes.py"), str(folder / "runs.json"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    mine = [line for line in done.stderr.splitlines() if "rank1" not in line]
    assert done.returncode == 0, "\n".join(mine)[:5000]


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in NUMBERS if name in line}


def check_same(one, two):
    """Every number of the second's curve, and its final weights, are the first's."""
    wanted, found = curve(one), curve(two)
    assert max(step for step, _ in found) == 4
    assert found == pytest.approx({key: wanted[key] for key in found}, rel=1e-4), two.name
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-4, msg=two.name)


def test_two_processes_train_as_one_does(stores, tmp_path):
    """In shards, whole where weights rest in some steps, and going on from each other."""

    def run(name, *extra, at=None):
        start = (
            [f"experiment.resume_from_checkpoint={tmp_path / at / 'checkpoint-2'}"] if at else []
        )
        return arguments(stores, tmp_path / name, *extra, *start)

    pictures = "experiment.generate_every=4"
    adafactor = ["optimizer.name=adafactor", "training.fsdp.checkpoints=sharded"]
    resting = ["model.transformer.self_conditioning=true", "model.transformer.critic_head=true"]
    resting += ["training.critic=self"]
    firsts = {"one": [pictures], "adafactor": adafactor, "resting": resting}
    in_one_process([run(name, *extra) for name, extra in firsts.items()])
    other = ["training.fsdp.reshard_after_forward=false", "model.gradient_checkpointing=true"]
    runs = [
        run("whole-resting", *resting),
        run("full", FSDP, pictures),
        run("shards", FSDP, *adafactor, *other),
        run("shards-from-one", FSDP, at="one"),
        run("shards-from-shards", FSDP, *adafactor, at="shards"),
    ]
    in_two_processes(runs, tmp_path)
    in_one_process([run("from-full", FSDP, at="full"), run("from-shards", *adafactor, at="shards")])
    for name in ("full", "shards-from-one", "from-full"):
        check_same(tmp_path / "one", tmp_path / name)
    for name in ("shards", "shards-from-shards", "from-shards"):
        check_same(tmp_path / "adafactor", tmp_path / name)
    check_same(tmp_path / "resting", tmp_path / "whole-resting")
    grids = [tmp_path / name / "samples" / "step-00000004.png" for name in ("one", "full")]
    assert grids[0].read_bytes() == grids[1].read_bytes()
    assert not (tmp_path / "shards" / "checkpoint-2" / "unwrapped_model").exists()


@pytest.mark.parametrize(
    "words, variable, said",
    [
        (["optimizer.name=8bit_adamw"], None, "lion or adafactor, or training.parallel=ddp"),
        (["training.fsdp.cpu_offload=true"], None, "is for GPUs"),
        ([], "ACCELERATE_USE_FSDP", "--use_fsdp: muse-train shards by itself"),
        ([], "ACCELERATE_USE_DEEPSPEED", "--use_deepspeed: muse-train shards by itself"),
    ],
)
def test_what_cannot_be_had_is_refused(stores, tmp_path, monkeypatch, capfd, words, variable, said):
    if variable:
        monkeypatch.setenv(variable, "true")
    assert main(arguments(stores, tmp_path / "run", FSDP, *words)) == 2
    assert said in capfd.readouterr().err
