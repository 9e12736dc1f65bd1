"""Sources that stall, break off or fail: read again without giving a sample twice, or given up."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from range_server import RangeServer, serve
from test_tokenize_hostile import END, member

from tokenize_stage.process import Stopped
from tokenize_stage.sources.config import DatasetConfig
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.sources.read import ReadPatience, SourceFailed, read_patience, read_samples
from tokenize_stage.sources.sample import InputShard, Sample, Skipped
from tokenize_stage.sources.watch import POLL_S, read_watched

QUICK = ReadPatience(timeout_s=0.5, attempts=4, pause_s=0.01)
KEYS = [f"{i:03}" for i in range(40)]


def write_tar(path: Path, keys: list[str] = KEYS) -> Path:
    members = (member(f"{key}.jpg", key.encode() * 20_000) for key in keys)
    path.write_bytes(b"".join(members) + END)
    return path


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "0.tar")


@pytest.fixture
def server(tar: Path) -> Iterator[RangeServer]:
    with serve(tar.parent) as server:
        server.slow_s = 30
        yield server


def read(source: Path | str, patience: ReadPatience = QUICK) -> list[Sample | Skipped]:
    return list(read_samples(InputShard("0", str(source)), patience))


def assert_whole(outcomes: list[Sample | Skipped]) -> None:
    assert [outcome.key for outcome in outcomes] == KEYS
    assert all(isinstance(o, Sample) and o.data == o.key.encode() * 20_000 for o in outcomes)


def test_options_become_patience() -> None:
    dataset = DatasetConfig("x", read_timeout_s=7, read_attempts=2, max_sample_bytes=9)
    assert read_patience(dataset) == ReadPatience(7, 2, max_sample_bytes=9)
    for option in ("read_timeout_s", "read_attempts", "max_sample_bytes", "max_shard_bytes"):
        with pytest.raises(ValueError, match=rf"dataset.{option}=0: it must be"):
            DatasetConfig("x", **{option: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "faults", [["500", "503", "429"], ["cut", "cut"], ["drip"], ["slow", "cut"]]
)
def test_http_that_fails_for_a_while(server: RangeServer, faults: list[str]) -> None:
    server.faults["0.tar"] = [*faults]
    assert_whole(read(f"{server.url}/0.tar"))
    assert len(server.requests) == len(faults) + 1


@pytest.mark.parametrize(
    "fault, error, requests",
    [
        ("404", FileNotFoundError, 1),
        ("403", PermissionError, 1),
        ("400", SourceFailed, 1),
        ("500", SourceFailed, 4),
        ("cut", SourceFailed, 4),
    ],
)
def test_http_that_fails(
    server: RangeServer, fault: str, error: type[OSError], requests: int
) -> None:
    server.faults["0.tar"] = [fault] * 4
    with pytest.raises(error, match="0.tar"):
        read(f"{server.url}/0.tar")
    assert len(server.requests) == requests


def test_no_server() -> None:
    with pytest.raises(SourceFailed, match=r"127.0.0.1:9/0.tar cannot be read: 4 attempts failed"):
        read("http://127.0.0.1:9/0.tar")


def test_a_source_that_changes_between_two_attempts(tar: Path, server: RangeServer) -> None:
    server.faults["0.tar"] = ["cut"]
    samples = read_samples(InputShard("0", f"{server.url}/0.tar"), QUICK)
    first = next(samples)
    write_tar(tar, KEYS[1:])
    with pytest.raises(SourceFailed, match="has changed while it was read"):
        list(samples)
    assert first.key == "000"


def test_a_command_that_hangs_is_killed_and_run_again(tar: Path) -> None:
    once, pids = tar.parent / "once", tar.parent / "pids"
    command = (
        f"if test -e {once}; then cat {tar}; else touch {once}; head -c 900000 {tar}; "
        f"sleep 1000 & echo $$ $! > {pids}; wait; fi"
    )
    assert_whole(read(f"pipe:{command}"))
    for pid in pids.read_text().split():
        assert_ended(int(pid))


def assert_ended(pid: int) -> None:
    for _ in range(50):
        status = Path(f"/proc/{pid}/status")
        try:
            if "State:\tZ" in status.read_text():
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.1)
    raise AssertionError(f"{pid} still runs")


def test_a_command_that_fails_is_run_again_and_its_whole_output_is_enough(tar: Path) -> None:
    once = tar.parent / "once"
    command = f"test -e {once} && cat {tar} || {{ touch {once}; head -c 900000 {tar}; exit 7; }}"
    assert_whole(read(f"pipe:{command}"))
    with pytest.raises(SourceFailed, match="ended with status 7"):
        read(f"pipe:head -c 900000 {tar}; exit 7")


def test_a_file_that_gives_no_more_bytes_is_given_up(tar: Path) -> None:
    fifo = tar.parent / "fifo.tar"
    os.mkfifo(fifo)
    begin = time.monotonic()
    with subprocess.Popen(
        f"exec 3<>{fifo}; head -c 900000 {tar} >&3; sleep 1000", shell=True, start_new_session=True
    ) as writer:
        try:
            found = []
            with pytest.raises(SourceFailed, match=r"TimeoutError: it gave no byte for 0.5 s"):
                for outcome in read_samples(
                    InputShard("0", str(fifo)), ReadPatience(0.5, attempts=2, pause_s=0.01)
                ):
                    found.append(outcome.key)
            assert found == KEYS[: len(found)] and len(found) > 10
            assert time.monotonic() - begin < 10
        finally:
            os.killpg(writer.pid, 9)


@pytest.mark.parametrize("when", ["while it waits for a byte", "between two attempts"])
def test_stop_ends_the_waiting(tar: Path, when: str) -> None:
    command = f"head -c 900000 {tar}; " + ("sleep 1000" if "byte" in when else "exit 1")
    stop = threading.Event()
    samples = read_samples(
        InputShard("0", f"pipe:{command}"), ReadPatience(timeout_s=30, pause_s=1000), stop
    )
    for _ in range(10):
        next(samples)
    threading.Timer(0.5, stop.set).start()
    begin = time.monotonic()
    with pytest.raises(Stopped):
        list(samples)
    assert time.monotonic() - begin < 1.5


def test_what_comes_at_the_very_end_is_not_lost() -> None:
    def read_late(delay_s: float, _: object) -> Iterator[Skipped]:
        time.sleep(delay_s)
        yield Skipped("a", "b", "c")

    for step in range(100):  # around the time at which the waiting thread looks again
        read = partial(read_late, POLL_S * (0.9 + 0.2 * step / 100))
        assert len(list(read_watched(read, 9, threading.Event()))) == 1


def test_a_slow_consumer_is_no_stall_and_closing_ends_the_command(tar: Path) -> None:
    pid = tar.parent / "pid"
    samples = read_samples(
        InputShard("0", f"pipe:echo $$ > {pid}; cat {tar}; sleep 1000"), ReadPatience(timeout_s=0.3)
    )
    next(samples)
    time.sleep(1)
    assert next(samples).key == "001"
    samples.close()  # type: ignore[attr-defined]
    assert_ended(int(pid.read_text()))


def test_images_behind_urls(tmp_path: Path) -> None:
    for name in ("a b.jpg", "flaky.jpg"):
        (tmp_path / name).write_bytes(b"an image")
    lines = ["url\ttext\tpwatermark"]
    names = ["a b.jpg", "flaky.jpg", "gone.jpg", "dead.jpg"]
    with serve(tmp_path) as server:
        server.faults = {"flaky.jpg": ["500"], "dead.jpg": ["500"] * 9}
        lines += [f'{server.url}/{name}\tsays "{name}"\t0.5' for name in names]
        (tmp_path / "t.tsv").write_text("\n".join(lines))
        (shard,) = list_input_shards(DatasetConfig(f"{tmp_path}/t.tsv"))
        good, flaky, gone, dead = read_samples(shard, QUICK)
    row = {"url": f"{server.url}/a b.jpg", "pwatermark": "0.5"}
    assert good == Sample("000000000", b"an image", None, 'says "a b.jpg"', shard.source, row)
    assert isinstance(flaky, Sample) and flaky.data == b"an image"
    assert isinstance(gone, Skipped) and gone.reason.endswith("/gone.jpg does not exist")
    assert isinstance(dead, Skipped) and "HTTPError 500" in dead.reason


def test_a_hung_source_does_not_keep_the_process_from_ending(tar: Path) -> None:
    fifo = tar.parent / "fifo.tar"
    os.mkfifo(fifo)
    script = (
        "from tokenize_stage.sources.read import *\n"
        "from tokenize_stage.sources.sample import InputShard\n"
        f"try: next(read_samples(InputShard('0', '{fifo}'), ReadPatience(0.3, attempts=1)))\n"
        "except SourceFailed: print('given up')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "given up\n"), done.stderr


def test_parquet_over_http(tmp_path: Path) -> None:
    table = pa.table({"image": [b"one", b"two"], "label": [1, 0]})
    pq.write_table(table, tmp_path / "t.parquet")
    with serve(tmp_path) as server:
        server.faults["t.parquet"] = ["", "", "500"]
        (shard,) = list_input_shards(DatasetConfig(f"{server.url}/t.parquet"))
        found = list(read_samples(shard, QUICK))
    assert [(sample.data, sample.class_id) for sample in found] == [(b"one", 1), (b"two", 0)]
