"""The writer of shards: rows of several batches, failures, what the device or the disk does."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from storage.reader import TokenStore
from storage.schema import ArrayColumn, StoreMeta, Tokenizer
from storage.writer import create_store, finished_shards
from tokenize_stage.pipeline import store_writer as module
from tokenize_stage.pipeline.decode_ahead import End, Step
from tokenize_stage.pipeline.progress import Progress
from tokenize_stage.pipeline.rows import FIELDS, Row
from tokenize_stage.pipeline.store_writer import StoreWriter
from tokenize_stage.pixels.decode import Picture
from tokenize_stage.process import Stopped
from tokenize_stage.sources.sample import InputShard, Sample, Skipped
from tokenize_stage.text.config import TextConfig
from tokenize_stage.text.text_columns import TextColumns
from tokenize_stage.work.ledger import TaskReport, failures, record_failure

A, B = InputShard("a", "a.tar"), InputShard("b", "b.tar")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    made_by = Tokenizer("vq", "MaskGitVQGAN", 64, [1, 2], "print")
    create_store(tmp_path, StoreMeta(2, {"codes": ArrayColumn("uint16", [2])}, {"codes": made_by}))
    return tmp_path


@pytest.fixture
def progress() -> Iterator[Progress]:
    progress = Progress(2, None)
    yield progress
    progress.close()


def open_writer(store: Path, progress: Progress) -> StoreWriter:
    report = TaskReport(store, 0, 1)
    return StoreWriter(store, FIELDS, TextColumns(TextConfig()), progress, report)


def row(shard: InputShard, number: int) -> Step:
    picture = Picture((np.zeros((3, 2, 2), np.uint8),), 4, 4, 0.0, 0.0, 4.0, 4.0)
    sample = Sample(f"{number}", b"", None, None, shard.source)
    return shard, Row(sample, f"{number:064}", picture, {})


def skip(shard: InputShard, key: str) -> Step:
    return shard, Skipped(key, shard.source, "bad image: torn")


def pending(first: int, count: int) -> Future[dict[str, np.ndarray]]:
    """The codes of rows first, first + 1, …: each twice its number."""
    future: Future[dict[str, np.ndarray]] = Future()
    future.set_result({"codes": np.repeat(np.arange(first, first + count), 2).reshape(-1, 2)})
    return future


def test_rows_of_batches_that_cross_shards_come_out_in_order(
    store: Path, progress: Progress
) -> None:
    record_failure(store, "b", "of an earlier run")
    with open_writer(store, progress) as writer:
        writer.put([row(A, 0), skip(A, "x"), row(A, 1)], pending(0, 2))
        writer.put([skip(A, "y"), (A, End()), row(B, 2), row(B, 3)], pending(2, 2))
        writer.put([(B, End())], None)
    made = TokenStore(store)
    assert made.shards == ["a", "b"]
    assert made.read_codes(slice(None)).tolist() == [[n, n] for n in range(4)]
    assert made.table(["key", "source"]).to_pylist() == [
        {"key": f"{n}", "source": f"{'ab'[n // 2]}.tar"} for n in range(4)
    ]
    assert made.skipped()["key"].to_pylist() == ["x", "y"]
    assert progress.rows == 4 and progress.skipped == {"bad image": 2}
    assert failures(store) == {}


def test_a_failed_shard_is_dropped_and_noted_and_the_next_is_written(
    store: Path, progress: Progress
) -> None:
    with open_writer(store, progress) as writer:
        writer.put([row(A, 0), skip(A, "x"), (A, End("timed out")), row(B, 1)], pending(0, 2))
        writer.put([(B, End())], None)
    assert TokenStore(store).read_codes(slice(None)).tolist() == [[1, 1]]
    assert failures(store)["a"]["reason"] == progress.failed["a"] == "timed out"
    assert not progress.skipped  # its rejections are in no shard


def test_a_shard_without_its_end_is_not_written(store: Path, progress: Progress) -> None:
    with pytest.raises(Stopped), open_writer(store, progress) as writer:
        writer.put([row(A, 0), (A, End()), row(B, 1)], pending(0, 2))
        raise Stopped
    assert [*finished_shards(store)] == ["a"]


def test_a_stop_does_not_wait_for_a_device_that_hangs(
    store: Path, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_S", 0.3)
    hanging: Future[dict[str, np.ndarray]] = Future()
    with pytest.raises(Stopped), open_writer(store, progress) as writer:
        writer.put([row(A, 0), (A, End())], hanging)
        raise Stopped
    assert not finished_shards(store)
    hanging.set_result({"codes": np.zeros((1, 2), int)})  # its thread ends


def test_batches_in_flight_are_bounded(store: Path, progress: Progress) -> None:
    hanging: Future[dict[str, np.ndarray]] = Future()
    codes = [hanging, *(pending(n, 1) for n in range(1, 9))]
    given: list[int] = []
    with open_writer(store, progress) as writer:

        def give() -> None:
            for number, one in enumerate(codes):
                writer.put([row(A, number)], one)
                given.append(number)

        thread = threading.Thread(target=give)
        thread.start()
        thread.join(0.5)
        assert len(given) == 1 + module.AHEAD
        hanging.set_result({"codes": np.zeros((1, 2), int)})
        thread.join()
        writer.put([(A, End())], None)
    assert len(TokenStore(store)) == 9


def test_an_error_of_the_device_or_the_disk_reaches_who_puts(
    store: Path, progress: Progress
) -> None:
    broken: Future[dict[str, np.ndarray]] = Future()
    broken.set_exception(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"), open_writer(store, progress) as writer:
        writer.put([row(A, 0)], broken)
        while True:
            writer.put([skip(A, "x")], None)
    (store / "shards").rmdir()
    (store / "shards").write_text("no folder")
    with pytest.raises(OSError), open_writer(store, progress) as writer:
        writer.put([row(A, 0), (A, End())], pending(0, 1))
