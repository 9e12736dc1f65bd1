"""A small token store with views, sources, rejected samples and a further column, for tests of
what changes stores; and ways to compare stores byte for byte and to kill what changes them."""

import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa

from storage.schema import ArrayColumn, StoreMeta, Tokenizer
from storage.writer import ShardWriter, create_store, expect_shards

K = 1024


def make_meta(backend: str, **changes) -> StoreMeta:
    tokenizer = Tokenizer("vq", "MaskGitVQGAN", K, [4, 4], "f" * 64)
    options = {"transform": {"resize": "bilinear"}, "backend": backend, "chunk_rows": 32} | changes
    return StoreMeta(32, {"codes": ArrayColumn("uint16", [16])}, {"codes": tokenizer}, **options)


def fill_store(path: Path, backend: str, counts=(80, 0, 50), first=0, **changes) -> Path:
    """Shard i has counts[i] rows, two views of every key, and one rejected sample."""
    create_store(path, make_meta(backend, **changes))
    names = [f"{first + index:05d}" for index in range(len(counts))]
    expect_shards(path, names)
    extra = pa.schema([("score", pa.float32()), ("url", pa.string())])
    for number, (name, rows) in enumerate(zip(names, counts, strict=True), first):
        rng = np.random.default_rng(number)
        with ShardWriter(path, name, f"in/{name}.tar", extra_columns=extra) as writer:
            keys = [f"{number}-{row // 2:04d}" for row in range(rows)]
            writer.add(
                {
                    "codes": rng.integers(0, K, (rows, 16)),
                    "key": keys,
                    "class_id": rng.integers(0, 5, rows),
                    "caption": [f"picture {key}" if row % 3 else None for row, key in
                                enumerate(keys)],
                    "view": [row % 2 for row in range(rows)],
                    "score": rng.random(rows),
                    "url": [f"https://example.org/{key}" for key in keys],
                }
            )  # fmt: skip
            writer.skip(f"bad-{number}", "not an image: no header")
    return path


def content(path: Path) -> dict[str, bytes | None]:
    """Every file and folder below a store, hidden ones too."""
    paths = sorted(path.rglob("*"))
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in paths}


def stamps(path: Path) -> dict[str, int]:
    """When every file and folder of a store was changed last."""
    return {str(p): p.stat().st_mtime_ns for p in [path, *path.rglob("*")]}


def kill_at_every_step(
    action: Callable[[], object], start: Path | None, path: Path, stride: int = 1
) -> int:
    """Runs `action`, which makes or changes `path`, in a process that is killed (SIGKILL) before
    its first new folder, JSON file, rename, link or removal, then before its second (or by
    `stride`) and so on; runs it again each time, and demands what an uninterrupted run leaves.

    `path` begins as a copy of `start`, or is not there. Returns how far it came.
    """

    def begin() -> None:
        shutil.rmtree(path, ignore_errors=True)
        if start is not None:
            shutil.copytree(start, path)

    begin()
    action()
    whole = content(path)
    for step in count(step=stride):
        begin()
        if not _run_killed(action, step):
            assert content(path) == whole
            return step
        action()
        assert not content(path).keys() ^ whole.keys(), f"killed at step {step}"
        assert content(path) == whole, f"killed at step {step}"
    raise AssertionError


def _run_killed(action: Callable[[], object], step: int) -> bool:
    """Runs `action` in a fork until its step number `step`; whether it came so far."""
    child = os.fork()
    if child == 0:
        steps = count()
        for name in ("mkdir", "rename", "replace", "link", "rmdir", "unlink"):
            setattr(os, name, _killing(getattr(os, name), steps, step))
        Path.write_text = _killing(Path.write_text, steps, step)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), "the action failed"
    return status != 0


def _killing(function: Callable, steps: count, last: int) -> Callable:
    def call(*args, **options):
        if next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return call
