"""kill -9 of muse-tokenize at random instants, and polite stops: the store comes out the same.

One process imports torch and then forks each run, so that a run lasts a fraction of a second and
every kill falls into work.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from storage.reader import TokenStore
from storage.writer import finished_shards
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

KILLS = 24
FORKER = """
import os, sys, json
from tokenize_stage.encode import main
for line in sys.stdin:  # argv -> a child that runs it, its process id; "wait" -> its exit status
    argv = json.loads(line)
    if argv == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        status = main(argv)
        if status == 75:
            sys.exit(status)  # as a command ends: waits for threads that are not daemons
        os._exit(status)  # without the half second that torch takes to go
    print(child, flush=True)
"""


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Forker:
    """Starts runs of muse-tokenize and says how they ended."""

    def __init__(self) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", FORKER], text=True, **pipes)

    def start(self, argv: list[str] | str) -> int:
        """Returns the process id of a new run, which stays a zombie until `wait`."""
        print(json.dumps(argv), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Returns its exit status; minus the signal's number when one ended it."""
        return self.start("wait")


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.process.stdin.close()
    forker.process.wait()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run over five tars of 12 images each, two of them broken."""
    folder = tmp_path_factory.mktemp("kill")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MaskGitVQGAN(
            resolution=32,
            hidden_channels=32,
            channel_mult=(1, 1),
            num_res_blocks=1,
            z_channels=8,
            quantized_embed_dim=8,
            num_embeddings=64,
        ).save_pretrained(folder / "vq")
    rng = np.random.default_rng(0)
    for number in range(5):
        with TarWriter(str(folder / f"{number}.tar")) as tar:
            for index in range(12):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(buffer, "PNG")
                data = buffer.getvalue() if index % 10 else b"broken"
                tar.write({"__key__": f"{number}-{index:02}", "png": data, "cls": index})
    return [
        f"dataset.shards_path_or_url={folder}",
        f"model.vq_model.pretrained={folder}/vq",
        "dataset.preprocessing.resolution=32",
        "encode.batch_size=8",
        "encode.device=cpu",
    ]


def content(store: Path) -> dict[str, bytes | None]:
    """Every file and folder below a store, hidden ones too."""
    paths = sorted(store.rglob("*"))
    return {str(p.relative_to(store)): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.mark.parametrize("backend", ["zarr", "arrow"])
def test_killed_at_random_instants_and_run_again_equals_uninterrupted(
    forker: Forker, arguments: list[str], tmp_path: Path, backend: str
) -> None:
    argv = [*arguments, f"store.backend={backend}"]
    forker.start([*argv, f"store.path={tmp_path}/first"])
    assert forker.wait() == 0
    start = time.monotonic()
    forker.start([*argv, f"store.path={tmp_path}/whole"])
    assert forker.wait() == 0
    duration_s = time.monotonic() - start
    whole = content(tmp_path / "whole")
    assert whole == content(tmp_path / "first")
    assert len(TokenStore(tmp_path / "whole")) == 5 * 10

    rng, finished = random.Random(0), []
    for number in range(4 * KILLS):  # on a busy machine some fall before or after the work
        fell_into_work = sum(0 < count < 5 for count in finished)
        if number >= KILLS // 2 and fell_into_work >= KILLS // 8:
            break
        store = tmp_path / str(number)
        child = forker.start([*argv, f"store.path={store}"])
        time.sleep(duration_s * (number % (KILLS // 2) + rng.random()) / (KILLS // 2))
        os.kill(child, signal.SIGKILL)
        status = forker.wait()
        assert status in (-9, 0)
        finished.append(len(finished_shards(store)))
        for name, manifest in finished_shards(store).items():
            assert (manifest["rows"], manifest["skipped"]) == (10, 2), name
        forker.start([*argv, f"store.path={store}"])
        assert forker.wait() == 0
        assert content(store) == whole, f"killed with {finished[-1]} shards finished"
    assert sum(0 < count < 5 for count in finished) >= KILLS // 8, finished  # fell into work


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_keeps_finished_shards_and_exits_with_75(
    forker: Forker, arguments: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    argv = [*arguments, "encode.batch_size=2", f"store.path={tmp_path}/store"]
    child = forker.start(argv)
    wait_until(lambda: finished_shards(tmp_path / "store"))
    os.kill(child, number)
    assert forker.wait() == 75
    assert 1 <= len(finished_shards(tmp_path / "store")) < 5
    forker.start(argv)
    assert forker.wait() == 0
    forker.start([*argv, f"store.path={tmp_path}/whole"])
    assert forker.wait() == 0
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def seconds_to_stop(forker: Forker, child: int) -> float:
    """SIGTERM to a run that must end with 75; one that does not end is killed after 20 s."""
    started = time.monotonic()
    os.kill(child, signal.SIGTERM)
    killer = threading.Timer(20, os.kill, (child, signal.SIGKILL))
    killer.start()
    assert forker.wait() == 75
    killer.cancel()
    return time.monotonic() - started


def test_a_stop_signal_ends_a_run_whose_input_stalls(
    forker: Forker, arguments: list[str], tmp_path: Path
) -> None:
    fifo = tmp_path / "stalls.tar"
    os.mkfifo(fifo)
    source = f"pipe:cat {fifo}"
    child = forker.start(
        [*arguments, f"dataset.shards_path_or_url={source}", f"store.path={tmp_path}/store"]
    )
    ends: list[int] = []

    def is_being_read() -> list[int]:
        with suppress(OSError):  # nobody reads yet
            ends.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return ends

    wait_until(is_being_read)
    try:
        assert seconds_to_stop(forker, child) < 5
    finally:
        os.close(ends[0])  # the end of the file for `cat`
    assert not finished_shards(tmp_path / "store")


def test_a_stop_signal_ends_a_run_whose_samples_are_all_rejected(
    forker: Forker, arguments: list[str], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "endless.tar", "w") as tar:
        for name in ("a.cls", "b.cls"):
            tar.addfile(tarfile.TarInfo(name))
    os.truncate(tmp_path / "endless.tar", 2 * 512)  # without its end, to be repeated for ever
    source = f"pipe:while cat {tmp_path}/endless.tar; do true; done"
    child = forker.start(
        [*arguments, f"dataset.shards_path_or_url={source}", f"store.path={tmp_path}/store"]
    )
    wait_until((tmp_path / "store/expected.json").exists)
    time.sleep(0.5)
    assert seconds_to_stop(forker, child) < 5
    assert not finished_shards(tmp_path / "store")
