"""The job scripts on a real Slurm of two nodes (tests/slurm_cluster): whatever befalls the tasks of
an array, the store ends equal, file by file, to that of one undisturbed process.

Faults fall into the middle of a shard: its tar is a pipe that stops half-way (`stalled`).
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from storage.seal import seal
from tokenize_stage.encode import main as encode
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests/slurm_cluster/cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SHARDS, IMAGES = 20, 8


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Cluster:
    """Slurm's commands, in the folder of the repository, and the state of jobs."""

    def __init__(self, folder: str):
        self.folder = folder
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "MUSE"))}
        self.environment = {
            **own,
            "SLURM_CONF": f"{folder}/slurm.conf",
            "MUSE_PYTHON": sys.executable,
            "MUSE_SITE": "",
            "MUSE_MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *words: object, status: int = 0) -> str:
        command = [str(word) for word in words]
        options = {"cwd": ROOT, "env": self.environment, "text": True, "capture_output": True}
        done = subprocess.run(command, **options)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout.strip()

    def change(self, action: str, *node: str) -> None:
        """start, crash NODE, stop: see cluster.sh."""
        self.run(SCRIPT, action, self.folder, *node)

    def submit(self, logs: Path, *words: object) -> str:
        return self.run("sbatch", "--parsable", f"--output={logs}/%x-%j.out", *words)

    def show(self, job: str) -> dict[str, dict[str, str]]:
        """Index in the array ("" for a job that is none) -> what Slurm says of the task."""
        lines = self.run("scontrol", "show", "job", "-o", job).splitlines()
        found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
        return {fields.get("ArrayTaskId", ""): fields for fields in found}

    def finish(self, job: str, seconds: float = 90) -> dict[str, tuple[str, int]]:
        """Waits for a job; index -> state, how often it was started again."""
        wait_until(lambda: not self.run("squeue", "-h", "-j", job, "-o", "%T"), seconds)
        return {n: (t["JobState"], int(t["Restarts"])) for n, t in self.show(job).items()}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=path)]:
        reason = f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    cluster = Cluster(tempfile.mkdtemp(prefix="muse-slurm-"))
    try:
        cluster.change("start")
        yield cluster
    finally:
        cluster.change("stop")


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 tars of 8 images each, one of them broken, and beside it a tokenizer."""
    folder = tmp_path_factory.mktemp("slurm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MaskGitVQGAN(
            resolution=16,
            hidden_channels=32,
            channel_mult=(1, 1),
            num_res_blocks=1,
            z_channels=8,
            quantized_embed_dim=8,
            num_embeddings=32,
        ).save_pretrained(folder / "vq")
    rng = np.random.default_rng(0)
    (folder / "tars").mkdir()
    for number in range(SHARDS):
        with TarWriter(str(folder / f"tars/{number:05}.tar")) as tar:
            for index in range(IMAGES):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(buffer, "PNG")
                data = b"broken" if index == number == 3 else buffer.getvalue()
                tar.write({"__key__": f"{number}-{index}", "png": data, "cls": index % 2})
    return folder / "tars"


def arguments(tars: Path, store: Path) -> list[str]:
    return [
        f"dataset.shards_path_or_url={tars}/{{00000..{SHARDS - 1:05}}}.tar",
        f"model.vq_model.pretrained={tars.parent}/vq",
        "dataset.preprocessing.resolution=16",
        f"encode.batch_size={IMAGES}",
        "encode.decode_threads=1",  # so that little is read ahead of what is written
        "encode.device=cpu",
        f"store.path={store}",
    ]


@pytest.fixture(scope="module")
def whole(tars: Path) -> Path:
    """The store that one undisturbed process makes of them."""
    assert encode(arguments(tars, tars.parent / "whole")) == 0
    seal(tars.parent / "whole")
    return tars.parent / "whole"


def content(store: Path) -> dict[str, bytes | None]:
    """Every file and folder of a store, hidden ones too; who made it is no part of it."""
    inside = {p.relative_to(store): p for p in sorted(store.rglob("*"))}
    return {
        str(path): p.read_bytes() if p.is_file() else None
        for path, p in inside.items()
        if path.parts[0] != "work"
    }


def shards(store: Path) -> dict[str, int]:
    """The finished shards, and when each was."""
    return {p.parent.name: p.stat().st_mtime_ns for p in store.glob("shards/*/manifest.json")}


@contextmanager
def stalled(tar: Path) -> Iterator[Callable[[], object]]:
    """A tar whose reader gets half of it and then waits; yields whether there is a reader.

    At the end the whole tar is there again, for the next reader; the last one has to be gone.
    """
    data, ends = tar.read_bytes(), []
    tar.unlink()
    os.mkfifo(tar)

    def is_read() -> list[int]:
        with suppress(OSError):  # nobody reads yet
            if not ends:
                ends.append(os.open(tar, os.O_WRONLY | os.O_NONBLOCK))
                os.write(ends[0], data[: len(data) // 2])
        return ends

    yield is_read
    spare = tar.with_suffix(".whole")
    spare.write_bytes(data)
    spare.replace(tar)
    for end in ends:
        os.close(end)


@pytest.mark.slow
def test_two_tasks_of_two_processes_make_what_one_makes(
    cluster: Cluster, tars: Path, whole: Path, tmp_path: Path
) -> None:
    job = cluster.submit(
        tmp_path, "--array=0-1", "--ntasks-per-node=2", "--gpus-per-node=2",
        "slurm/tokenize_array.sh", *arguments(tars, tmp_path / "store"),
    )  # fmt: skip
    assert cluster.finish(job) == {"0": ("COMPLETED", 0), "1": ("COMPLETED", 0)}
    seal(tmp_path / "store")
    assert content(tmp_path / "store") == content(whole)


@pytest.mark.slow
def test_after_scancel_the_same_line_encodes_what_is_missing(
    cluster: Cluster, tars: Path, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    words = ["--array=0-1", "slurm/tokenize_array.sh", *arguments(tars, store)]
    with stalled(tars / "00019.tar") as is_read:
        job = cluster.submit(tmp_path, *words)
        wait_until(is_read)
        wait_until(lambda: len(shards(store)) > 10)  # all of task 0, some of task 1
        cluster.run("scancel", f"{job}_1")
        assert cluster.finish(job) == {"0": ("COMPLETED", 0), "1": ("CANCELLED", 0)}
    before = shards(store)
    again = cluster.submit(tmp_path, *words)
    assert cluster.finish(again) == {"0": ("COMPLETED", 0), "1": ("COMPLETED", 0)}
    assert before.items() <= shards(store).items() and len(before) < SHARDS
    seal(store)
    assert content(store) == content(whole)


def kill_process_of(job: str, index: int) -> None:
    """kill -9 of the Python of one task."""
    wanted = {f"SLURM_ARRAY_JOB_ID={job}".encode(), f"SLURM_ARRAY_TASK_ID={index}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_python = b"tokenize_stage.cli" in (process / "cmdline").read_bytes()
            environment = {*(process / "environ").read_bytes().split(b"\0")}
            if is_python and environment > wanted and (process / "comm").read_text() != "srun\n":
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.slow
def test_a_warned_and_a_crashed_task_come_back_by_themselves_and_alone(
    cluster: Cluster, tars: Path, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with stalled(tars / "00018.tar") as is_read_by_0, stalled(tars / "00019.tar") as is_read_by_1:
        job = cluster.submit(
            tmp_path, f"--output={tmp_path}/tokenize-%A_%a.out", "--array=0-2",
            "slurm/tokenize_array.sh", *arguments(tars, store),
        )  # fmt: skip
        wait_until(lambda: is_read_by_0() and is_read_by_1())
        kill_process_of(job, 0)
        cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
        wait_until(lambda: [cluster.show(job)[n]["Restarts"] for n in "01"] == ["1", "1"])
    done = {str(n): ("COMPLETED", restarts) for n, restarts in enumerate([1, 1, 0])}
    assert cluster.finish(job) == done
    log = (tmp_path / f"tokenize-{job}_0.out").read_text()
    assert len(re.findall(r"^task .* \d+ to do$", log, re.MULTILINE)) == 2  # requeue.sh reads it
    seal(store)
    assert content(store) == content(whole)


@pytest.mark.slow
def test_a_task_on_a_lost_node_runs_again_elsewhere(
    cluster: Cluster, tars: Path, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with stalled(tars / "00019.tar") as is_read:
        job = cluster.submit(
            tmp_path, "--array=0-1", "slurm/tokenize_array.sh", *arguments(tars, store)
        )
        wait_until(is_read)
        wait_until(lambda: len(shards(store)) > 10)
        cluster.change("crash", cluster.show(job)["1"]["NodeList"])
    wait_until(lambda: cluster.show(job)["1"]["Restarts"] == "1")
    cluster.change("start")
    assert cluster.finish(job)["1"] == ("COMPLETED", 1)
    seal(store)
    assert content(store) == content(whole)


@pytest.mark.slow
def test_the_time_limit_only_interrupts(
    cluster: Cluster, tars: Path, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with stalled(tars / "00019.tar") as is_read:
        job = cluster.submit(
            tmp_path, "--array=0", "--time=1", "--signal=B:USR1@45",
            "slurm/tokenize_array.sh", *arguments(tars, store),
        )  # fmt: skip

        def comes_back() -> bool:  # warned while it reads, or, as Slurm is early, before
            is_read()
            return cluster.show(job)["0"]["Restarts"] == "1"

        wait_until(comes_back)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert cluster.finish(job) == {"0": ("COMPLETED", 1)}
    seal(store)
    assert content(store) == content(whole)


def test_an_incomplete_store_is_not_sealed_and_not_trained_on(
    cluster: Cluster, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    for path in store.glob("sealed.json"):
        path.unlink()
    (store / "shards/00007").rename(tmp_path / "00007")
    job = cluster.submit(tmp_path, "slurm/seal.sh", store)
    after = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]
    train = cluster.submit(tmp_path, *after, "slurm/train_transformer.sh")
    assert cluster.finish(job) == {"": ("FAILED", 0)}
    log = (tmp_path / f"muse-seal-{job}.out").read_text()
    assert "missing 1: 00007" in log
    assert f"--only-missing config={store}/work/config.yaml store.path={store}" in log
    assert not (store / "sealed.json").exists()
    assert cluster.finish(train) == {"": ("CANCELLED", 0)}
    (tmp_path / "00007").rename(store / "shards/00007")
    assert cluster.finish(cluster.submit(tmp_path, "slurm/seal.sh", store))[""][0] == "COMPLETED"
    assert content(store) == content(whole)


@pytest.mark.slow
def test_one_line_makes_the_store_and_the_model(
    cluster: Cluster, tars: Path, whole: Path, tmp_path: Path
) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    printed = cluster.run(
        "slurm/submit_pipeline.sh", "--tasks", "2", "--logs", tmp_path / "logs",
        *arguments(tars, store), "--",
        f"experiment.output_dir={run}", "training.max_train_steps=2", "training.batch_size=8",
        "model.transformer.hidden_size=24", "model.transformer.num_hidden_layers=1",
        "model.transformer.num_attention_heads=2", "model.transformer.intermediate_size=32",
        "optimizer.params.learning_rate=1e-3",
    )  # fmt: skip
    array, sealing, train = re.search(r"^jobs (\d+) (\d+) (\d+);", printed, re.MULTILINE).groups()
    states = {name: state for job in (array, sealing, train) for name, (state, _) in
              [(f"{job}_{n}", value) for n, value in cluster.finish(job).items()]}  # fmt: skip
    assert set(states.values()) == {"COMPLETED"} and len(states) == 4
    assert content(store) == content(whole)
    assert (run / "model/config.json").is_file()
    logs = {path.name for path in (tmp_path / "logs").iterdir()}
    assert logs == {f"tokenize-{array}_{n}.out" for n in (0, 1)} | {
        f"seal-{sealing}.out", f"train-{train}.out",
    }  # fmt: skip


def training(whole: Path, run: Path, *words: str) -> list[str]:
    """sbatch's words for a run of two nodes, a task on each."""
    return [
        "--nodes=2", "--ntasks-per-node=1", "slurm/train_transformer.sh",
        f"dataset.train_store={whole}", f"experiment.output_dir={run}",
        "experiment.log_every=1", "experiment.save_every=20", "training.batch_size=4",
        "training.use_ema=true", "model.transformer.hidden_size=24",
        "model.transformer.num_hidden_layers=1", "model.transformer.num_attention_heads=2",
        "model.transformer.intermediate_size=32", "optimizer.params.learning_rate=1e-3", *words,
    ]  # fmt: skip


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


@pytest.mark.slow
def test_two_nodes_train_on_as_if_nothing_had_happened(
    cluster: Cluster, whole: Path, tmp_path: Path
) -> None:
    """Preempted by a requeue, then warned, in the middle: the same weights, bit for bit."""
    one, other = tmp_path / "disturbed", tmp_path / "undisturbed"
    steps = "training.max_train_steps=300"
    job = cluster.submit(tmp_path, *training(whole, one, steps))
    wait_until(lambda: steps_done(one) > 10)
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: steps_done(one) > 40 and cluster.show(job)[""]["Restarts"] == "1")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.finish(job) == {"": ("COMPLETED", 2)}
    quiet = cluster.submit(tmp_path, *training(whole, other, steps))
    assert cluster.finish(quiet) == {"": ("COMPLETED", 0)}
    assert steps_done(one) == steps_done(other) == 300
    weights = [(run / "model/model.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_pictures_of_a_trained_model(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    run, pictures = tmp_path / "run", tmp_path / "pictures"
    train = cluster.submit(tmp_path, *training(whole, run, "training.max_train_steps=2"))
    job = cluster.submit(
        tmp_path, f"--dependency=afterok:{train}", "slurm/evaluate.sh", f"model={run}/model",
        f"output_dir={pictures}", "images_per_class=2", "timesteps=2",
    )  # fmt: skip
    assert cluster.finish(job) == {"": ("COMPLETED", 0)}
    assert len(list(pictures.glob("*/*.png"))) == 4
