"""The job scripts without a cluster: syntax, and when run_and_requeue requeues (fake scontrol)."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[1] / "slurm"


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.sh")), ids=lambda path: path.name)
def test_syntax(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert "/home" not in path.read_text() and "--partition" not in path.read_text()


def start(tmp_path, command):
    """Runs a command under run_and_requeue; scontrol writes down what it was called with."""
    fake = tmp_path / "scontrol"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    fake.chmod(0o755)
    script = f'set -euo pipefail\nsource {SLURM}/requeue.sh\nrun_and_requeue 7_3 "$@"\n'
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment["SLURM_JOB_NODELIST"] = "node1"
    return subprocess.Popen(["bash", "-c", script, "job", *command], env=environment)


@pytest.mark.parametrize("status", [0, 1, 75])
def test_only_75_requeues_and_the_status_is_kept(tmp_path, status):
    assert start(tmp_path, ["sh", "-c", f"exit {status}"]).wait() == status
    requeued = tmp_path / "requeued"
    assert requeued.is_file() == (status == 75)
    if status == 75:
        assert requeued.read_text() == "requeue 7_3\n"


def test_a_warning_goes_on_to_the_command(tmp_path):
    program = f"trap 'exit 75' USR1; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    process = start(tmp_path, ["bash", "-c", program])
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 75 and (tmp_path / "requeued").exists()
