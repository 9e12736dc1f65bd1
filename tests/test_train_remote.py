"""Training from stores behind URLs: the same batches as from the folder, through faults too."""

import json
import socket
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
import torch
from range_server import serve
from store_factory import make_store
from test_train_resume import SMALL, run_to_end

from storage.file_cache import CacheOptions
from storage.reader import TokenStore
from storage.seal import seal
from storage.tombstones import drop
from train_stage.loading.loader import TokenLoader
from train_stage.loading.store_stream import Reading


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MUSE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["zarr", "arrow"])
def path(request, tmp_path_factory):
    path = make_store(tmp_path_factory.mktemp(request.param), backend=request.param)
    drop(path, "key", ["0-7"])
    seal(path)
    return path


def same_batches(remote, local, reading):
    ours, theirs = (TokenLoader(store, 40, 3, reading=reading) for store in (remote, local))
    for step in (0, 1, 9, 4):
        a, b = ours.batch(step), theirs.batch(step)
        assert torch.equal(a.codes, b.codes) and torch.equal(a.class_ids, b.class_ids)
        np.testing.assert_array_equal(a.rows, b.rows)


@pytest.mark.parametrize("reading", [Reading(), Reading(shuffle="window", window_chunks=1)])
def test_over_http(path, tmp_path, reading):
    local = TokenStore(path)
    with serve(path) as server:
        server.faults[".arrow"] = server.faults["c/0/0"] = ["500", "", "cut", "short"]
        server.faults["rows.parquet"] = ["503"]
        remote = TokenStore(server.url, CacheOptions(tmp_path / "own"))
        assert len(remote) == len(local) == 299 and not remote.is_local
        same_batches(remote, local, reading)
        assert remote.table().equals(local.table())
        chosen = [store.rows_where("class_id == 3").tolist() for store in (remote, local)]
        assert chosen[0] == chosen[1]
        before = sum("codes" in name for name, _ in server.requests)
        same_batches(TokenStore(server.url, CacheOptions(tmp_path / "own")), local, reading)
        assert sum("codes" in name for name, _ in server.requests) == before  # all from the cache


def test_a_damaged_cache_is_fetched_again(path, tmp_path):
    with serve(path) as server:
        options = CacheOptions(tmp_path / "own")
        whole = TokenStore(server.url, options).read_codes(slice(None))
        for entry in (tmp_path / "own").rglob("*.range"):
            content = bytearray(entry.read_bytes())
            content[len(content) // 2] ^= 1
            entry.write_bytes(content)
        store = TokenStore(server.url, options)
        np.testing.assert_array_equal(store.read_codes(slice(None)), whole)
        assert len(store.table()) == len(whole)


def test_a_store_that_is_not_sealed_says_so_over_http(tmp_path):
    with serve(make_store(tmp_path)) as server:
        with pytest.raises(ValueError, match="muse-store seal"):
            TokenStore(server.url)


def test_muse_train_over_http_equals_local(path, tmp_path):
    def losses(store, run):
        argv = [f"dataset.train_store={store}", f"experiment.output_dir={run}", *SMALL]
        assert run_to_end([*argv, "dataset.shuffle=window", "dataset.window_chunks=1"]) == 0
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    with serve(path) as server:
        assert losses(server.url, tmp_path / "a") == losses(path, tmp_path / "b")


@pytest.fixture(scope="module")
def s3_endpoint():
    """A moto server in a process of its own."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


def test_from_a_bucket(path, s3_endpoint, monkeypatch):
    """Sealed, as it was then; not sealed, by listing its shards."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3_endpoint})
    bucket = f"muse-{path.parent.name.replace('_', '-')}"
    files = fsspec.filesystem("s3", endpoint_url=s3_endpoint)
    files.mkdir(bucket)
    files.put(f"{path}/", f"{bucket}/store/", recursive=True)
    local = TokenStore(path)
    same_batches(TokenStore(f"s3://{bucket}/store"), local, Reading(shuffle="window"))
    files.rm(f"{bucket}/store/sealed.json")
    remote = TokenStore(f"s3://{bucket}/store")
    same_batches(remote, local, Reading())
    assert remote.dataset().count_rows() == 299
