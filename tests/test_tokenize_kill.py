"""kill -9 of muse-tokenize at random instants, and polite stops: the store comes out the same.

    MUSE_KILLS=100 pytest tests/test_tokenize_kill.py -k killed -s

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
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_factory import make_tokenizer
from webdataset import TarWriter

from storage.reader import TokenStore
from storage.writer import finished_shards
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

KILLS = int(os.environ.get("MUSE_KILLS", "12"))  # for each backend
TARS, ROWS = 5, 20
FORKER = """
import os, sys, json
from transformers import AutoTokenizer
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
    """Arguments of a run over five tars of 12 images each, two of them broken.

    Two tokenizers at two resolutions, two views, ids of the captions; batches cross the tars.
    """
    folder = tmp_path_factory.mktemp("kill")
    for name, codes in (("coarse", 64), ("fine", 32)):
        with torch.random.fork_rng():
            torch.manual_seed(codes)
            MaskGitVQGAN(
                resolution=32,
                hidden_channels=32,
                channel_mult=(1, 1),
                num_res_blocks=1,
                z_channels=8,
                quantized_embed_dim=8,
                num_embeddings=codes,
            ).save_pretrained(folder / name)
    make_tokenizer().save_pretrained(folder / "clip")
    rng = np.random.default_rng(0)
    for number in range(TARS):
        with TarWriter(str(folder / f"{number}.tar")) as tar:
            for index in range(12):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(buffer, "PNG")
                data = buffer.getvalue() if index % 10 else b"broken"
                key = f"{number}-{index:02}"
                tar.write({"__key__": key, "png": data, "cls": index, "txt": "words " * index})
    return [
        f"dataset.shards_path_or_url={folder}",
        f"model.vq_models.f2.pretrained={folder}/coarse",
        f"model.vq_models.small.pretrained={folder}/fine",
        "model.vq_models.small.resolution=16",
        f"text.tokenizers.clip={folder}/clip",
        "dataset.preprocessing.views=[centre,random_flip]",
        "dataset.preprocessing.resolution=32",
        "encode.batch_size=8",
        "encode.device=cpu",
    ]


def content(store: Path) -> dict[str, bytes | None]:
    """Every file and folder of a store, hidden ones too; work/ is none of it."""
    paths = [path.relative_to(store) for path in sorted(store.rglob("*"))]
    return {
        str(path): (store / path).read_bytes() if (store / path).is_file() else None
        for path in paths
        if path.parts[0] != "work"
    }


@pytest.mark.timeout(120 + 10 * KILLS)
@pytest.mark.parametrize("backend", ["zarr", "arrow"])
def test_killed_again_and_again_at_random_instants_equals_uninterrupted(
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
    assert len(TokenStore(tmp_path / "whole")) == TARS * ROWS

    rng, left = random.Random(0), []  # shards finished, after each kill
    for number in range(8 * KILLS):  # each a run, killed unless it was done before
        if len(left) >= KILLS and sum(0 < count < TARS for count in left) >= KILLS // 8:
            break
        store = tmp_path / "killed"
        child = forker.start([*argv, f"store.path={store}"])
        time.sleep(duration_s * rng.random())
        os.kill(child, signal.SIGKILL)
        status = forker.wait()
        assert status in (-9, 0)
        finished = finished_shards(store)
        left += [len(finished)] * (status == -9)
        for name, manifest in finished.items():
            assert (manifest["rows"], manifest["skipped"]) == (ROWS, 2), name
        if len(finished) == TARS or number % 5 == 4:
            forker.start([*argv, f"store.path={store}"])
            assert forker.wait() == 0
            assert content(store) == whole, f"killed with these finished: {left}"
            store.rename(tmp_path / str(number))
    print(f"{len(left)} kills, shards finished by then: {Counter(left)}")
    assert len(left) >= KILLS and sum(0 < count < TARS for count in left) >= KILLS // 8, left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_keeps_finished_shards_and_exits_with_75(
    forker: Forker, arguments: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    argv = [*arguments, "encode.batch_size=2", f"store.path={tmp_path}/store"]
    child = forker.start(argv)
    wait_until(lambda: finished_shards(tmp_path / "store"))
    os.kill(child, number)
    assert forker.wait() == 75
    assert 1 <= len(finished_shards(tmp_path / "store")) < TARS
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


def test_an_input_that_stalls_holds_up_neither_what_is_before_it_nor_a_stop_signal(
    forker: Forker, arguments: list[str], tmp_path: Path
) -> None:
    fifo = tmp_path / "stalls.tar"
    os.mkfifo(fifo)
    folder = arguments[0].partition("=")[2]
    source = f"dataset.shards_path_or_url={folder}/0.tar::pipe:cat {fifo}"
    child = forker.start([*arguments, source, f"store.path={tmp_path}/store"])
    ends: list[int] = []

    def is_being_read() -> list[int]:
        with suppress(OSError):  # nobody reads yet
            ends.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return ends

    wait_until(is_being_read)
    try:
        wait_until(lambda: finished_shards(tmp_path / "store"))  # in a batch that is not full
        assert seconds_to_stop(forker, child) < 20
    finally:
        os.close(ends[0])  # the end of the file for `cat`
    assert [*finished_shards(tmp_path / "store")] == ["0"]


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
    assert seconds_to_stop(forker, child) < 20
    assert not finished_shards(tmp_path / "store")
