"""Reading and decoding ahead: order, errors in their turn, bounded, and stopping early."""

import io
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from tokenize_stage.pipeline import decode_ahead as module
from tokenize_stage.pipeline.decode_ahead import Decoded, decode_ahead
from tokenize_stage.process import Stopped
from tokenize_stage.sources.input_shards import InputShard
from tokenize_stage.sources.sample import Skipped


def folder_shard(root: Path, name: str, count: int) -> InputShard:
    """A shard of `count` images of very different decoding times, every fifth of them broken."""
    (root / name).mkdir()
    for i in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (1 + 997 * i % 1500, 8), (i, 0, 0)).save(buffer, "PNG")
        data = buffer.getvalue() if i % 5 else b"broken"
        (root / name / f"{i:03}.png").write_bytes(data)
    files = tuple((f"{i:03}.png", None) for i in range(count))
    return InputShard(name, str(root / name), files)


def ours() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name == "read" or name.startswith("decode")]


@pytest.mark.parametrize("threads, queue_size", [(1, 1), (4, 2), (3, 100)])
def test_outcomes_come_in_order_and_none_closes_every_shard(
    tmp_path: Path, threads: int, queue_size: int
) -> None:
    counts = {"a": 30, "b": 0, "c": 7}
    shards = [folder_shard(tmp_path, name, count) for name, count in counts.items()]
    found: list[list[str]] = [[]]
    for outcome in decode_ahead(shards, 8, threads, queue_size, threading.Event()):
        if outcome is None:
            found.append([])
        elif isinstance(outcome, Skipped):
            found[-1].append(f"{outcome.key} {outcome.reason.split(':')[0]}")
        else:
            assert outcome.picture.pixels[0, 0, 0] == int(outcome.sample.key[:3])
            found[-1].append(outcome.sample.key)
    expected = [f"{i:03}.png" if i % 5 else f"{i:03}.png bad image" for i in range(30)]
    assert found == [expected, [], expected[:7], []]
    assert not ours()


def test_an_error_of_reading_comes_after_all_that_was_read_before(tmp_path: Path) -> None:
    good = folder_shard(tmp_path, "a", 12)
    shards = [good, InputShard("b", str(tmp_path / "gone.tar")), good]
    outcomes = decode_ahead(shards, 8, 4, 4, threading.Event())
    for _ in range(13):
        last = next(outcomes)
    assert last is None
    with pytest.raises(FileNotFoundError, match="gone.tar"):
        next(outcomes)
    assert not ours()


def test_reading_stays_a_bounded_way_ahead_and_stops_when_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read_samples = module.read_samples

    def counted(shard: InputShard):
        for sample in read_samples(shard):
            reads.append(sample.key)
            yield sample

    monkeypatch.setattr(module, "read_samples", counted)
    shard = folder_shard(tmp_path, "a", 200)
    outcomes = decode_ahead([shard], 8, threads=2, queue_size=5, stop=threading.Event())
    assert isinstance(next(outcomes), Skipped) and isinstance(next(outcomes), Decoded)
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        time.sleep(0.02)
    assert 10 < len(reads) <= 2 + 5 + 1 + 4 * 2 + 1  # used, queued, in hand, decoding, being read
    outcomes.close()
    assert not ours()


def test_stop_is_seen_between_two_outcomes_that_are_there(tmp_path: Path) -> None:
    stop = threading.Event()
    outcomes = decode_ahead([folder_shard(tmp_path, "a", 200)], 8, 2, 50, stop)
    assert isinstance(next(outcomes), Skipped)
    stop.set()
    with pytest.raises(Stopped):
        next(outcomes)
    assert not ours()


def test_stop_does_not_wait_for_a_read_that_stalls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(module, "JOIN_S", 0.1)
    monkeypatch.setattr(module, "read_samples", lambda shard: iter(go_on.wait, True))
    outcomes = decode_ahead([folder_shard(tmp_path, "a", 1)], 8, 1, 1, stop)
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    try:
        with pytest.raises(Stopped):
            next(outcomes)
        assert time.monotonic() - started < 2 and "read" in ours()
    finally:
        go_on.set()
    deadline = time.monotonic() + 5
    while ours() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not ours()
