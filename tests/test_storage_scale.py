"""A store of 100 M rows opens quickly and in little memory, though it has no data but the index."""

import numpy as np
import pytest

from storage.bench import open_afresh, write_large_store
from storage.files import open_files
from storage.index import open_index, write_index
from storage.reader import TokenStore
from storage.tombstones import Tombstone, write_tombstone

SHARDS = 10_000
MB = 1e6


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large")
    assert write_large_store(path, SHARDS) < 2 * MB
    return path


def test_a_hundred_million_rows_open_at_once(large):
    """The target is 100 ms, measured by storage/bench.py; here a busy machine is allowed for."""
    opened = [open_afresh(large) for _ in range(3)]
    assert opened[0]["rows"] == 100_000_000
    assert min(each["seconds"] for each in opened) < 1
    assert max(each["bytes"] for each in opened) < 200 * MB


def test_a_hundred_million_rows_are_numbered(large):
    store = TokenStore(large)
    rows = np.array([0, 9_999, 10_000, 54_321_987, 99_999_999])
    shard, place = store.numbers.locate(rows)
    assert shard.tolist() == [0, 0, 1, 5432, 9999]
    assert place.tolist() == [0, 9999, 0, 1987, 9999]
    bounds = store.chunk_bounds()
    assert len(bounds) == SHARDS * 10 + 1 and bounds[-1] == len(store)


def test_many_tombstones_cost_little(large):
    """Their rows are looked up when they are written, not when a store is opened."""
    index = open_index(open_files(large))
    for number in range(100):
        rows = {f"{number * 100 + shard:06d}": [number, 5000] for shard in range(3)}
        tombstone = Tombstone(
            "key", [f"{number}-{row}" for row in range(6)], "", index.digest, rows
        )
        write_tombstone(large, tombstone)
    write_index(large, index)
    opened = [open_afresh(large) for _ in range(2)]
    assert opened[0]["rows"] == 100_000_000 - 100 * 3 * 2
    assert min(each["seconds"] for each in opened) < 1
    assert max(each["bytes"] for each in opened) < 200 * MB
