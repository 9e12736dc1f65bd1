"""How tokenize_stage.bench times the whole of stage one: a tar of JPEGs -> codes on disk.

Every run is a process of its own, its imports done before the clock starts.
"""

import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
import webdataset
from torch import nn

from storage.reader import TokenStore
from tokenize_stage import encode
from tokenize_stage.bench_decode import reference_pixels
from tokenize_stage.bench_encode import make_model, reference_codes
from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

REFERENCE = "the reference's"
OURS = {
    "cpu": {"ours, float32": "float32", "ours, bfloat16": "bfloat16"},
    "cuda": {"ours, float32": "float32", "ours, float16": "float16", "ours, bfloat16": "bfloat16"},
}
SMALL = {"hidden_channels": 32, "channel_mult": (1, 1, 1, 1, 1), "num_res_blocks": 1}
SHARDS, SHARD_IMAGES, EARLY = 50, 8, 5  # of the memory's run


@dataclass(frozen=True)
class PipelineRun:
    """What is encoded, by what; folder has the tar, the tokenizer, and what was made."""

    folder: Path
    model: str
    resolution: int
    device: str
    batch_size: int

    def prepare(self, photographs: Sequence[Path], count: int) -> None:
        """Writes the tar and the tokenizer."""
        write_tar(self.folder / "images.tar", photographs, count)
        make_model(self.model).save_pretrained(self.folder / "vq")


def write_tar(path: Path, photographs: Sequence[Path], count: int) -> None:
    """`count` samples as img2dataset writes them: jpg, txt, json."""
    with tarfile.open(path, "w") as tar:
        for number, photograph in enumerate(islice(cycle(photographs), count)):
            caption, said = f"photograph {number}", {"url": photograph.name}
            parts = {
                "jpg": photograph.read_bytes(),
                "txt": caption.encode(),
                "json": json.dumps(said).encode(),
            }
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))


def time_pipelines(run: PipelineRun, count: int, turns: int) -> dict[str, list[float]]:
    """Way -> images a second, a number a turn."""
    ways: dict[str, Callable[[], float]] = {REFERENCE: lambda: in_child(encode_as_reference, run)}
    for name, dtype in OURS[run.device].items():
        ways[name] = lambda dtype=dtype: in_child(encode_as_ours, run, dtype)  # type: ignore[misc]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, timed in ways.items():
            rates[name].append(count / timed())
    return rates


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def encode_as_ours(run: PipelineRun, dtype: str) -> float:
    """Seconds that muse-tokenize takes."""
    store = run.folder / dtype
    shutil.rmtree(store, ignore_errors=True)
    start = time.perf_counter()
    _muse_tokenize(
        f"dataset.shards_path_or_url={run.folder / 'images.tar'}",
        f"dataset.preprocessing.resolution={run.resolution}",
        f"model.vq_model.pretrained={run.folder / 'vq'}",
        f"store.path={store}",
        f"encode.device={run.device}",
        f"encode.dtype={dtype}",
        f"encode.batch_size={run.batch_size}",
    )
    return time.perf_counter() - start


def _muse_tokenize(*options: str) -> None:
    with redirect_stdout(StringIO()) as printed:
        status = encode.main(list(options))
    if status:
        raise RuntimeError(f"exit status {status}: {printed.getvalue()}")


def encode_as_reference(run: PipelineRun) -> float:
    """Seconds of a loop over webdataset: Pillow in this process, one resize an image, float32."""
    start = time.perf_counter()
    vq = load_vq_model(run.folder / "vq").to(run.device)
    samples = webdataset.WebDataset(str(run.folder / "images.tar"), shardshuffle=False)
    codes: dict[str, np.ndarray] = {}
    for batch in _batches(samples.decode("pil").to_tuple("__key__", "jpg"), run.batch_size):
        pixels = torch.stack([reference_pixels(image, run.resolution) for _, image in batch])
        made = reference_codes(vq, pixels)
        codes |= {key: one for (key, _), one in zip(batch, made, strict=True)}
    np.savez(run.folder / "reference.npz", **codes)  # type: ignore[arg-type]
    return time.perf_counter() - start


def _batches(samples: Any, size: int) -> Iterator[list[Any]]:
    """Lists of `size` samples, the last may be shorter."""
    endless = iter(samples)
    while batch := list(islice(endless, size)):
        yield batch


def changed_codes(run: PipelineRun) -> dict[str, float]:
    """Way -> share of codes that differ from the reference's. Raises ValueError for lost images."""
    with np.load(run.folder / "reference.npz") as file:
        expected = dict(file)
    changed = {REFERENCE: 0.0}
    for name, dtype in OURS[run.device].items():
        store = TokenStore(run.folder / dtype)
        keys = store.table(["key"])["key"].to_pylist()
        if sorted(keys) != sorted(expected):
            raise ValueError(f"{name}: {len(keys)} rows of {len(expected)} images")
        wanted = np.stack([expected[key] for key in keys])
        changed[name] = float((store.read_codes(slice(None)) != wanted).mean())
    return changed


def memory_mib(folder: Path, photographs: Sequence[Path], resolution: int) -> tuple[float, float]:
    """Resident MiB after shard 5 and after shard 50 of a run with a small tokenizer (Linux)."""
    write_tar(folder / "00.tar", photographs, SHARD_IMAGES)
    for number in range(1, SHARDS):
        os.link(folder / "00.tar", folder / f"{number:02d}.tar")
    torch.manual_seed(0)
    model = MaskGitVQGAN(**SMALL)
    nn.init.normal_(model.quantizer.vectors)
    model.save_pretrained(folder / "vq")
    return in_child(_watch_memory, folder, resolution)


def _watch_memory(folder: Path, resolution: int) -> tuple[float, float]:
    store, done = folder / "store", Event()
    seen: dict[int, float] = {}

    def watch() -> None:
        while not done.wait(0.05):
            shards = store / "shards"
            count = len(list(shards.glob("[!.]*"))) if shards.exists() else 0
            seen.setdefault(count, resident_mib())

    thread = Thread(target=watch)
    thread.start()
    try:
        _muse_tokenize(
            f"dataset.shards_path_or_url={folder}/*.tar",
            f"dataset.preprocessing.resolution={resolution}",
            f"model.vq_model.pretrained={folder / 'vq'}",
            f"store.path={store}",
            "encode.device=cpu",
        )
    finally:
        done.set()
        thread.join()
    early = min(count for count in [*seen, SHARDS] if count >= EARLY)
    return seen.get(early, resident_mib()), resident_mib()


def resident_mib() -> float:
    """Of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
