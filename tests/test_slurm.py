"""The job scripts without a cluster (fake scontrol): syntax, when run_and_requeue requeues, what
submit_pipeline.sh would submit. On a real Slurm: test_slurm_cluster.py."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "slurm"
LEFT = "task 0 of 2: 10 of 20 input shards, 3 finished before, %d to do"


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.sh")), ids=lambda path: path.name)
def test_syntax_and_no_site_in_the_scripts(path):
    subprocess.run(["bash", "-n", path], check=True)
    lines = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    assert not [line for line in lines if any(w in line for w in ("partition", "account", "qos"))]
    assert "/home" not in path.read_text()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    scripts = [*SLURM.glob("*.sh"), ROOT / "tests/slurm_cluster/cluster.sh", ROOT / ".ci/run"]
    subprocess.run(["shellcheck", "-x", *scripts], check=True, cwd=ROOT)


@pytest.fixture
def environment(tmp_path):
    """scontrol writes down what it was called with, or tells of a small cluster."""
    fake = tmp_path / "scontrol"
    config = "echo 'MaxArraySize            = 5'"
    fake.write_text(f'#!/bin/sh\n[ "$1" = show ] && {config} || echo "$@" >> {tmp_path}/requeued\n')
    fake.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith("MUSE")}
    path = f"{tmp_path}:{os.environ['PATH']}"
    return {**own, "PATH": path, "SLURM_JOB_NODELIST": "node1", "MUSE_SITE": ""}


@pytest.fixture
def start(tmp_path, environment):
    """Runs a command under run_and_requeue, as a job whose log is tmp_path/log."""

    def start(*command, retries=2):
        script = f'set -euo pipefail\nsource {SLURM}/requeue.sh\nrun_and_requeue 7_3 {retries} "$@"'
        with open(tmp_path / "log", "a") as log:
            words = ["bash", "-c", script, "job", *command]
            return subprocess.Popen(words, env=environment, stdout=log)

    return start


def requeued(tmp_path):
    lines = (tmp_path / "requeued").read_text().splitlines() if any(tmp_path.glob("req*")) else []
    assert lines == ["requeue 7_3"] * len(lines)
    return len(lines)


@pytest.mark.parametrize("status", [0, 2, 3, 75, 76])
def test_only_75_requeues_and_the_status_is_kept(tmp_path, start, status):
    assert start("sh", "-c", f"exit {status}").wait() == status
    assert requeued(tmp_path) == (status == 75)
    assert "crashed" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("trap 'exit 75' USR1; touch ready; while :; do sleep 0.05; done", 75),
        ("trap 'exit 0' USR1; touch ready; while :; do sleep 0.05; done", 0),
        ("touch ready; sleep 20", 75),  # not listening yet: the signal ends it
    ],
)
def test_a_warning_goes_on_to_the_command(tmp_path, start, program, status):
    process = start("bash", "-c", f"cd {tmp_path}; {program}")
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == status
    assert requeued(tmp_path) == (status == 75)


def test_a_crash_is_tried_again_as_long_as_shards_get_finished(tmp_path, start):
    def crash(left, status="9"):
        assert start("sh", "-c", f"echo '{LEFT % left}'; exit {status}").wait() == int(status)
        return requeued(tmp_path)

    assert [crash(7), crash(7), crash(6), crash(6), crash(6)] == [1, 2, 3, 4, 4]
    assert "giving up: 3 crashes in a row" in (tmp_path / "log").read_text()
    assert crash(5, "75") == 5 and crash(5) == 6  # submitted again, and something got done


def test_a_crash_before_anything_was_read_is_no_progress(tmp_path, start):
    for count in (1, 2, 2):
        assert start("sh", "-c", "kill -9 $$").wait() == 137
        assert requeued(tmp_path) == count
    assert start("false", retries=0).wait() == 1
    assert requeued(tmp_path) == 2


@pytest.mark.parametrize("default", [None, "configs/train/imagenet.yaml"])
def test_training_without_words_has_a_configuration(environment, tmp_path, default):
    fake = tmp_path / "srun"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n')
    fake.chmod(0o755)
    slurm = {"SUBMIT_DIR": ROOT, "JOB_ID": 7, "JOB_NODELIST": "n", "CPUS_PER_TASK": 1}
    known = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    if default is not None:
        known["MUSE_TRAIN_CONFIG"] = default
    for given in ([], ["config=mine.yaml", "experiment.grace_s=20"]):
        job = ["bash", SLURM / "train_transformer.sh", *given]
        subprocess.run(job, env=environment | known, check=True, stdout=subprocess.DEVNULL)
        words = (tmp_path / "words").read_text().splitlines()
        config = default or "configs/train/fashion_mnist.yaml"
        assert words[words.index("-m") + 1 :] == [
            *["train_stage.train", "experiment.grace_s=150"],
            *(given or [f"config={config}"]),
        ]


def submit(environment, *words):
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([SLURM / "submit_pipeline.sh", *words], **options)


def test_a_dry_run_prints_jobs_that_wait_for_each_other(environment):
    environment |= {"MUSE_TOKENIZE_SBATCH": "--gpus-per-node=4 --time=1:00:00"}
    words = ["store.path=s", "dataset.shards_path_or_url={0..9}.tar"]
    options = ["--tasks", "100", "--processes", "4", "--at-once", "3", "--dry-run", "--partial"]
    done = submit(environment, *options, *words, "--", "config=train.yaml")
    assert done.returncode == 0, done.stderr
    array, seal, train = done.stdout.replace("\\", "").splitlines()
    assert "--array=0-4%3 --ntasks-per-node=4 " in array  # MaxArraySize is 5
    assert " --gpus-per-node=4 --time=1:00:00 slurm/tokenize_array.sh store.path=s data" in array
    assert "--dependency=afterany:<array> " in seal and "slurm/seal.sh s --partial" in seal
    assert "--dependency=afterok:<seal> --kill-on-invalid-dep=yes" in train
    assert "slurm/train_transformer.sh dataset.train_store=s config=train.yaml" in train
    assert len(submit(environment, "--dry-run", *words).stdout.splitlines()) == 2  # no train


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "0", "store.path=s"], "--tasks 0: a number from 1 on"),
        (["--tusks", "4"], "--tusks: neither an option"),
        (["task=1"], "store.path= is missing"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(environment, words, message):
    done = submit(environment, *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
