"""A store's files by every protocol, through faults, and the cache; all of it on loopback."""

import multiprocessing
import os
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from range_server import serve

from storage import remote_files
from storage.file_cache import CacheOptions, FileCache
from storage.files import LocalFiles, open_files
from storage.patience import Patience
from storage.remote_files import PIECE_BYTES, _cut, plan_requests

NO_CACHE = CacheOptions(Path("/nonexistent"), max_bytes=0)
QUICK = Patience(attempts=3, timeout_s=0.5, pause_s=0.01)
BIG = np.random.default_rng(0).bytes(2 * PIECE_BYTES + 12345)
CONTENT = {
    "store.json": b"{}",
    "two.bin": BIG[: 2 * PIECE_BYTES],
    "shards/a@v2/big.bin": BIG,
    "shards/a@v2/empty": b"",
    "shards/b #1%20?/x": b"odd name",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bucket with a store in it, on disk."""
    bucket = tmp_path_factory.mktemp("served")
    for name, content in CONTENT.items():
        (bucket / "store" / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / "store" / name).write_bytes(content)
    return bucket


@pytest.fixture
def server(folder):
    with serve(folder) as server:
        yield server


@pytest.fixture
def s3_settings(monkeypatch):
    """Points fsspec's S3 to an endpoint, as a user's configuration does."""
    pytest.importorskip("s3fs")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    return lambda endpoint: monkeypatch.setitem(
        fsspec.config.conf, "s3", {"endpoint_url": endpoint}
    )


@pytest.fixture(scope="module")
def s3_endpoint():
    """A moto server that holds CONTENT as s3://bucket/store."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    s3 = fsspec.filesystem("s3", endpoint_url=endpoint, key="key", secret="secret")
    s3.mkdir("bucket")
    for name, content in CONTENT.items():
        s3.pipe_file(f"bucket/store/{name}", content)
    yield endpoint
    server.stop()


@pytest.fixture(params=["folder", "file", "memory", "http", "s3"])
def files(request, folder):
    """CONTENT by every protocol."""
    if request.param == "folder":
        return open_files(folder / "store")
    if request.param == "file":
        return open_files(f"file://{folder}/store/")
    if request.param == "http":
        return open_files(f"{request.getfixturevalue('server').url}/store", NO_CACHE)
    if request.param == "s3":
        request.getfixturevalue("s3_settings")(request.getfixturevalue("s3_endpoint"))
        return open_files("s3://bucket/store", NO_CACHE)
    for name, content in CONTENT.items():
        fsspec.filesystem("memory").pipe_file(f"/store/{name}", content)
    return open_files("memory://store")


def test_every_protocol_reads_the_same(files):
    for name, content in CONTENT.items():
        assert files.read(name) == content
        assert files.exists(name)
    name = "shards/a@v2/big.bin"
    ranges = [(7, 3), (0, 1), (7, 3), (5, 0), (8, 100), (3, len(BIG) - 3), (len(BIG) - 1, 1)]
    assert files.read_ranges(name, ranges) == [BIG[a : a + n] for a, n in ranges]
    assert files.read_range(name, 1000, 17, fresh=True) == BIG[1000:1017]


def test_every_protocol_lists_or_says_that_it_cannot(files):
    if files.url.startswith("http"):
        assert files.list("shards") is None
        return
    assert files.list("shards") == ["a@v2", "b #1%20?"]
    assert files.list("") == ["shards", "store.json", "two.bin"]
    assert files.list("nowhere") == []


def test_every_protocol_names_what_is_missing_or_short(files):
    for read in (files.read, lambda name: files.read_range(name, 0, 1)):
        with pytest.raises(FileNotFoundError, match="store/shards/none"):
            read("shards/none")
    assert not files.exists("shards/none")
    for start in (len(BIG) - 10, len(BIG), len(BIG) + 10):  # at once: patience would take 40 s
        with pytest.raises(ValueError, match="store/shards/a@v2/big.bin is truncated"):
            files.read_range("shards/a@v2/big.bin", start, 11)


def test_listings_are_never_old(s3_settings, s3_endpoint):
    s3_settings(s3_endpoint)
    files = open_files("s3://bucket/growing", NO_CACHE)
    writer = fsspec.filesystem("s3", endpoint_url=s3_endpoint, key="key", secret="secret")
    writer.pipe_file("bucket/growing/shards/0/x", b"x")
    assert files.list("shards") == ["0"]
    writer.pipe_file("bucket/growing/shards/1/x", b"x")
    writer.pipe_file("bucket/growing/shards/", b"")  # a folder as some tools make it
    assert files.list("shards") == ["0", "1"]


def test_local_paths(folder):
    files = open_files(str(folder))
    assert isinstance(files, LocalFiles)
    assert files.local_path("store/store.json") == folder / "store/store.json"
    assert open_files("memory://store").local_path("store.json") is None


@pytest.fixture(params=["http", "s3"])
def faulty(request, server):
    """(server, files): both clients against a server that misbehaves when told to."""
    if request.param == "http":
        files = open_files(f"{server.url}/store", NO_CACHE, QUICK)
    else:  # an object's GET by path is S3's own protocol
        request.getfixturevalue("s3_settings")(server.url)
        files = open_files("s3://store", NO_CACHE, Patience(timeout_s=30))
        files.read("store.json")  # makes the client, which takes a while
        files.patience = QUICK
    server.requests.clear()
    return server, files


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "cut", "slow", "drip", "short"])
def test_what_may_pass_is_asked_again(faulty, fault):
    server, files = faulty
    server.slow_s = 60
    server.faults["two.bin"] = [fault]
    assert files.read_range("two.bin", 10, 1000) == BIG[10:1010]
    assert len(server.requests) >= 2 and not server.faults["two.bin"]


def test_a_whole_file_in_pieces_survives_faults(faulty):
    server, files = faulty
    server.faults["big.bin"] = ["500", "", "503", "cut", ""]
    assert files.read("shards/a@v2/big.bin") == BIG


@pytest.mark.parametrize("fault", ["500", "cut", "slow"])
def test_what_does_not_pass_ends(faulty, fault):
    server, files = faulty
    server.slow_s = 60
    server.faults["two.bin"] = [fault] * 1000
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="store/two.bin: 3 attempts failed"):
        files.read_range("two.bin", 10, 1000)
    assert time.monotonic() - start < 10
    assert files.traffic.retries == 2


@pytest.mark.parametrize(
    "status, error, words",
    [
        ("403", PermissionError, "access refused"),
        ("404", FileNotFoundError, "does not exist"),
        ("400", ValueError, "status 400"),
    ],
)
def test_what_cannot_pass_ends_at_once(faulty, status, error, words):
    server, files = faulty
    server.faults["two.bin"] = [status] * 1000
    with pytest.raises(error, match=f"store/two.bin.*{words}"):
        files.read_range("two.bin", 10, 1000)
    assert len(server.requests) == 1


def test_one_failing_range_fails_them_all(server):
    files = open_files(f"{server.url}/store", NO_CACHE, QUICK)
    server.faults["two.bin"] = ["403"]
    with pytest.raises(PermissionError):
        files.read_ranges("two.bin", [(start * 2**17, 10) for start in range(20)])


def test_no_server():
    with serve(Path("/nonexistent")) as server:
        url = server.url
    with pytest.raises(ConnectionError, match=f"{url}/x: 3 attempts failed"):
        open_files(url, NO_CACHE, QUICK).read("x")


def test_a_server_without_ranges(server, monkeypatch):
    server.ignores_ranges = True
    files = open_files(f"{server.url}/store", NO_CACHE, QUICK)
    assert files.read("two.bin") == BIG[: 2 * PIECE_BYTES]
    assert files.read("shards/a@v2/empty") == b""
    assert files.read_ranges("two.bin", [(5, 10), (10**6, 20)]) == [BIG[5:15], BIG[10**6 :][:20]]
    with pytest.raises(ValueError, match="truncated"):  # as long as asked for, but another part
        files.read_range("store.json", 1, 2)
    monkeypatch.setattr(remote_files, "WHOLE_LIMIT", 1000)
    with pytest.raises(ValueError, match="two.bin: the server ignores byte ranges"):
        files.read_range("two.bin", 5, 10)


def test_ranges_travel_together_and_at_once(server):
    files = open_files(f"{server.url}/store", NO_CACHE)
    near = [(start, 1000) for start in range(0, 100_000, 2000)]
    assert files.read_ranges("two.bin", near) == [BIG[a : a + n] for a, n in near]
    assert [asked for _, asked in server.requests] == ["bytes=0-98999"]
    server.delay_s = 0.1
    far = [(start * 2**17, 10) for start in range(32)]  # 16 connections: 0.2 s, not 3.2
    start = time.monotonic()
    assert files.read_ranges("two.bin", far) == [BIG[a : a + n] for a, n in far]
    assert time.monotonic() - start < 1.5
    server.delay_s = 0
    connections = server.connections
    for a, n in far:
        files.read_range("two.bin", a, n)
    assert server.connections == connections, "connections are kept"


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 120)), max_size=12))
def test_plan_covers_every_range(ranges):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_files, "PIECE_BYTES", 50)
        patch.setattr(remote_files, "GAP_BYTES", 7)
        spans = plan_requests(ranges)
    assert all(0 < stop - start <= 50 for start, stop in spans)
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))
    data = BIG[:420]
    bodies = [data[start:stop] for start, stop in spans]
    for start, length in ranges:
        assert _cut(start, start + length, spans, bodies) == data[start : start + length]
    wanted = {byte for start, length in ranges for byte in range(start, start + length)}
    for start, stop in spans:  # no gap of more than 7 is fetched
        unwanted = "".join(" x"[byte in wanted] for byte in range(start, stop))
        assert " " * 8 not in unwanted


@pytest.mark.parametrize("url", ["absent://store", "no-such-protocol://store"])
def test_a_missing_protocol_says_what_to_install(url):
    fsspec.register_implementation("absent", "no_such_package.Files", errtxt="Install no_such")
    with pytest.raises(ValueError, match=rf'{url} cannot.*pip install "open-muse\[remote\]"'):
        open_files(url)


def test_missing_credentials_are_named(s3_settings, s3_endpoint, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3_settings(f"{s3_endpoint}/")  # another instance than the other tests'
    with pytest.raises(PermissionError, match="s3://bucket/store/x.*credentials"):
        open_files("s3://bucket/store", NO_CACHE).read("x")


# the cache


@pytest.fixture
def cached(server, tmp_path):
    return open_files(f"{server.url}/store", CacheOptions(tmp_path / "cache"), QUICK)


def test_a_range_is_fetched_once_a_whole_file_each_time(server, cached):
    ranges = [(0, 10), (500_000, 100)]
    first = cached.read_ranges("two.bin", ranges)
    server.requests.clear()
    again = open_files(cached.url, cached._cache.options)  # another process, say
    assert again.read_ranges("two.bin", [*ranges, (0, 11)]) == [*first, BIG[:11]]
    assert server.requests == [("store/two.bin", "bytes=0-10")]
    assert (again.traffic.cache_hits, again.traffic.bytes_fetched) == (2, 11)
    assert again.read("store.json") == again.read("store.json") == b"{}"
    assert len(server.requests) == 3


def test_a_damaged_entry_is_mended_by_fresh(server, cached, tmp_path):
    cached.read_range("two.bin", 0, 100)
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(b"x" * 100)
    assert cached.read_range("two.bin", 0, 100) == b"x" * 100  # the reader's checksum finds it
    assert cached.read_range("two.bin", 0, 100, fresh=True) == BIG[:100]
    server.requests.clear()
    assert cached.read_range("two.bin", 0, 100) == BIG[:100]
    assert not server.requests
    entry.write_bytes(b"x" * 99)  # what is too short is no entry
    assert cached.read_range("two.bin", 0, 100) == BIG[:100]


def test_failures_leave_no_entry(server, cached, tmp_path):
    server.faults["two.bin"] = ["cut"] * 3
    with pytest.raises(ConnectionError):
        cached.read_range("two.bin", 0, 100)
    assert not (tmp_path / "cache").exists()


def test_the_cache_is_bounded_and_drops_the_least_recently_used(tmp_path):
    limit = 2**20
    cache = FileCache(CacheOptions(tmp_path, limit))
    (tmp_path / "photo.jpg").write_bytes(b"not ours" * 10**5)
    left_by_a_killed_writer = tmp_path / f"{'0' * 32}.range"
    left_by_a_killed_writer.write_bytes(b"half")
    os.utime(left_by_a_killed_writer, (0, 0))
    for number in range(100):
        cache.put(str(number), bytes([number]) * 30_000)
        assert cache.get("0", 30_000) == bytes(30_000)
        assert sum(file.stat().st_size for file in tmp_path.glob("*.range")) <= limit
    kept = [number for number in range(100) if cache.get(str(number), 30_000) is not None]
    assert kept[0] == 0 and kept[1:] == list(range(101 - len(kept), 100)) and len(kept) > 20
    assert (tmp_path / "photo.jpg").exists() and not left_by_a_killed_writer.exists()
    cache.put("large", bytes(limit))
    assert cache.get("large", limit) is None


def test_a_disk_that_takes_nothing_is_a_warning(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    files = open_files(f"{server.url}/store", CacheOptions(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="takes no more"):
        assert files.read_range("two.bin", 0, 10) == BIG[:10]


def read_everything(files, seed):
    order = np.random.default_rng(seed).permutation(len(BIG) // 40_000)
    ranges = [(int(part) * 40_000, 40_000) for part in order]
    for _ in range(2):
        for some in (ranges[:50], ranges[50:]):
            found = files.read_ranges("shards/a@v2/big.bin", some)
            assert found == [BIG[start : start + length] for start, length in some]


def test_processes_share_a_cache_that_is_too_small(server, tmp_path):
    options = CacheOptions(tmp_path, len(BIG) // 2)
    files = open_files(f"{server.url}/store", options)
    files.read("store.json")  # a connection that a forked process must not use
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=read_everything, args=(files, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    entries = list(tmp_path.iterdir())
    assert all(len(entry.stem) == 64 and entry.stat().st_size == 40_000 for entry in entries)
    assert 0 < len(entries) * 40_000 <= options.max_bytes


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert CacheOptions().directory == Path("/xdg/open-muse")
    monkeypatch.setenv("MUSE_CACHE_DIR", "/own")
    assert CacheOptions().directory == Path("/own")
    assert CacheOptions().max_bytes == 10 * 2**30
