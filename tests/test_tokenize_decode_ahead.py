"""Reading and decoding ahead: order, errors in their turn, bounded, and stopping early."""

import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tokenize_stage.pipeline import ahead as ahead_module
from tokenize_stage.pipeline import decode_ahead as module
from tokenize_stage.pipeline.batches import MAX_STEPS, batches
from tokenize_stage.pipeline.decode_ahead import End, Read, Step, decode_ahead
from tokenize_stage.pipeline.rows import Prepare, Row, preparation
from tokenize_stage.pixels.config import PreprocessingConfig
from tokenize_stage.pixels.views import Decoder
from tokenize_stage.process import Stopped
from tokenize_stage.selection.config import FiltersConfig
from tokenize_stage.selection.filters import Selection
from tokenize_stage.sources.read import read_samples
from tokenize_stage.sources.sample import InputShard, Sample, Skipped


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


def prepared(views: int = 1) -> Callable[[InputShard], Prepare]:
    preprocessing = PreprocessingConfig(resolution=8, views=["centre", "centre_flip"][:views])
    return preparation(Decoder(preprocessing, [8]), Selection(FiltersConfig()))


def run(
    shards: list[InputShard],
    threads: int = 2,
    ahead: int = 5,
    stop: threading.Event | None = None,
    read: Read = read_samples,
    views: int = 1,
) -> Iterator[Step | None]:
    return decode_ahead(shards, read, prepared(views), threads, ahead, stop or threading.Event())


def ours() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name in ("read", "open") or name.startswith("decode")]


def sample(data: bytes = b"", key: str = "a") -> Sample:
    return Sample(key, data, None, None, "source")


@pytest.mark.parametrize("threads, ahead", [(1, 1), (4, 2), (3, 100)])
@pytest.mark.parametrize("views", [1, 2])
def test_rows_come_in_order_and_an_end_closes_every_shard(
    tmp_path: Path, threads: int, ahead: int, views: int
) -> None:
    counts = {"a": 30, "b": 0, "c": 7}
    shards = [folder_shard(tmp_path, name, count) for name, count in counts.items()]
    found: dict[str, list[str]] = {}
    for step in run(shards, threads, ahead, views=views):
        assert step is not None
        shard, what = step
        words = found.setdefault(shard.name, [])
        if isinstance(what, End):
            words.append(f"end {what.failure}")
        elif isinstance(what, Skipped):
            words.append(f"{what.key} {what.reason.split(':')[0]}")
        else:
            assert what.picture.pixels[0][0, 0, 0] == int(what.sample.key[:3])
            assert what.sample.data == b"" and len(what.image_hash) == 64
            words.append(f"{what.sample.key} {what.picture.view}")
    rows = [
        [f"{i:03}.png {view}" for view in range(views)] if i % 5 else [f"{i:03}.png bad image"]
        for i in range(30)
    ]
    assert found == {
        "a": [*itertools.chain(*rows), "end None"],
        "b": ["end None"],
        "c": [*itertools.chain(*rows[:7]), "end None"],
    }
    assert not ours()


def test_an_input_that_fails_ends_with_the_reason_and_the_next_one_follows(tmp_path: Path) -> None:
    shards = [folder_shard(tmp_path, "a", 3), InputShard("b", str(tmp_path / "gone.tar"))]
    shards.append(folder_shard(tmp_path, "c", 1))
    ends = {s[0].name: s[1].failure for s in run(shards) if s and isinstance(s[1], End)}
    assert [*ends] == ["a", "b", "c"] and ends["a"] is ends["c"] is None
    assert "gone.tar" in ends["b"]


def test_an_error_of_ours_comes_after_all_that_was_read_before(tmp_path: Path) -> None:
    def read(shard: InputShard) -> Iterator[Sample | Skipped]:
        yield from [sample(), sample()]
        raise RuntimeError("a fault of the program")

    steps = run([InputShard("a", "a.tar")], read=read)
    assert isinstance(next(steps)[1], Skipped) and isinstance(next(steps)[1], Skipped)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        next(steps)
    assert not ours()


def test_the_next_input_is_opened_while_one_is_read() -> None:
    opened: list[str] = []

    def read(shard: InputShard) -> Iterator[Sample | Skipped]:
        opened.append(shard.name)
        yield from [sample()] * 50

    steps = run([InputShard(name, name) for name in "abcd"], threads=1, ahead=1, read=read)
    next(steps)
    time.sleep(0.2)
    assert opened == ["a", "b"]
    steps.close()


def test_reading_stays_a_bounded_way_ahead_and_stops_when_closed() -> None:
    reads = []

    def read(shard: InputShard) -> Iterator[Sample | Skipped]:
        for number in range(200):
            reads.append(number)
            yield sample()

    steps = run([InputShard("a", "a")], threads=2, ahead=5, read=read)
    next(steps)
    time.sleep(0.3)
    assert 4 < len(reads) <= 1 + (5 + 4 * 2) + 2  # used, queued, in hand and being read
    steps.close()
    assert not ours()


def test_undecoded_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNDECODED_BYTES", 1000)
    reads, go_on = [], threading.Event()

    def read(shard: InputShard) -> Iterator[Sample | Skipped]:
        for number in range(20):
            reads.append(number)
            yield sample(bytes(400))

    def prepare(_: Sample) -> list[Row]:
        go_on.wait(10)
        return []

    shard, stop = InputShard("a", "a"), threading.Event()
    steps = decode_ahead([shard], read, lambda _: prepare, 4, 100, stop)
    threading.Timer(0.3, lambda: (seen.append(len(reads)), go_on.set())).start()
    seen: list[int] = []
    assert [what for _, what in steps] == [End()]
    assert seen == [3] and len(reads) == 20  # two are held, the third waits


def test_nothing_for_a_while_is_a_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.2)

    def read(shard: InputShard) -> Iterator[Sample | Skipped]:
        yield sample()
        time.sleep(0.5)
        yield sample()

    kinds = [step and type(step[1]) for step in run([InputShard("a", "a")], read=read)]
    assert kinds in ([Skipped, *[None] * n, Skipped, End] for n in (1, 2))


def test_stop_is_seen_between_two_rows_that_are_there(tmp_path: Path) -> None:
    stop = threading.Event()
    steps = run([folder_shard(tmp_path, "a", 200)], 2, 50, stop)
    assert isinstance(next(steps)[1], Skipped)
    stop.set()
    with pytest.raises(Stopped):
        list(itertools.islice(steps, 20))
    assert not ours()


def test_stop_does_not_wait_for_a_read_that_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(ahead_module, "JOIN_S", 0.1)
    steps = run([InputShard("a", "a")], 1, 1, stop, lambda shard: iter(go_on.wait, True))
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    try:
        with pytest.raises(Stopped):
            next(steps)
        assert time.monotonic() - started < 2 and "read" in ours()
    finally:
        go_on.set()
    deadline = time.monotonic() + 5
    while ours() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not ours()


def test_an_input_that_ends_because_of_the_stop_is_not_taken_for_whole() -> None:
    stop, told = threading.Event(), []

    def read(shard: InputShard) -> Iterator[Sample | Skipped]:
        yield sample()
        stop.wait()  # and ends, as a command does that Ctrl-C ends

    steps = run([InputShard("a", "a")], stop=stop, read=read)
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Stopped):
        told += steps
    assert not any(isinstance(step and step[1], End) for step in told)


def test_batches_cross_shards_and_end_early_where_nothing_comes() -> None:
    a, b = InputShard("a", "a"), InputShard("b", "b")
    row, skip, end = Row(sample(), "", None, {}), Skipped("k", "s", "bad image: x"), End()
    steps = [(a, row), (a, skip), (a, end), (b, row), (b, row), (b, row), None, None, (b, end)]
    assert list(batches(steps, 2)) == [steps[:4], steps[4:6], steps[8:]]
    assert list(batches([*steps[:4], None, *steps[4:6]], 3)) == [steps[:4], steps[4:6]]
    assert [len(batch) for batch in batches([(a, skip)] * (MAX_STEPS + 1), 2)] == [MAX_STEPS, 1]
