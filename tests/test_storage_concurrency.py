"""Many processes on one store at once: writers, readers, drops and seals."""

import multiprocessing
import shutil
from itertools import count

import numpy as np
import pytest
from filled_store import make_meta

from storage.atomic import read_json
from storage.files import open_files
from storage.index import read_sealed
from storage.reader import TokenStore
from storage.rewrite import compact_store
from storage.seal import seal
from storage.tombstones import drop
from storage.verify import verify_store
from storage.writer import ShardWriter, create_store, expect_shards

CONTEXT = multiprocessing.get_context("fork")
ROWS = 20


@pytest.fixture(params=["zarr", "arrow"])
def path(tmp_path, request):
    create_store(tmp_path / "store", make_meta(request.param))
    return tmp_path / "store"


def rows_of(shard, writer=0):
    rng = np.random.default_rng([shard, writer])
    return {
        "codes": rng.integers(0, 1024, (ROWS, 16)),
        "key": [f"{shard}-{row}" for row in range(ROWS)],
        "class_id": np.full(ROWS, writer),
    }


def write_shards(path, shards, writer=0):
    expect_shards(path, [f"{shard:03d}" for shard in shards])
    for shard in shards:
        with ShardWriter(path, f"{shard:03d}", source="a") as made:
            made.add(rows_of(shard, writer))


def together(*actions):
    """Runs (function, arguments) pairs in a process each; fails when one fails."""
    processes = [CONTEXT.Process(target=function, args=args) for function, *args in actions]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def check_rows(store):
    """Every row is that of its key, and a shard is there whole or not at all."""
    codes, table = store.read_codes(slice(None)), store.table(["key", "class_id"]).to_pydict()
    keys = [tuple(map(int, key.split("-"))) for key in table["key"]]
    assert len(codes) == len(keys) == len(store) == len(set(keys))
    made = {}
    for key, writer, row in zip(keys, table["class_id"], codes, strict=True):
        shard = key[0], writer
        if shard not in made:
            made[shard] = rows_of(*shard)["codes"]
        np.testing.assert_array_equal(row, made[shard][key[1]])
    assert len({shard for shard, _ in made}) == len(made)  # no shard of two writers
    return keys


def repeat(path, action, *args):
    """Does something again and again until the file `stop` is there."""
    for _ in count():
        action(path, *args)
        if path.with_name("stop").exists():
            return


def read_all(path):
    check_rows(TokenStore(path))


def stop_after(path, *actions):
    together(*actions)
    path.with_name("stop").touch()


def test_writers_of_the_same_and_of_other_shards_with_readers(path):
    """Every shard is of one writer, whoever was first; a reader sees whole shards only."""
    writers = [(write_shards, path, range(first, first + 8), first) for first in (0, 0, 4, 8)]
    together((stop_after, path, *writers), (repeat, path, read_all))
    store = TokenStore(path)
    assert len(check_rows(store)) == 16 * ROWS and store.missing_shards() == []
    assert verify_store(path) == [] and not (path / "shards" / ".staging").exists()


def drop_one_by_one(path, shards):
    for shard in shards:
        drop(path, "key", [f"{shard}-3", f"{shard}-7"])


def test_writers_drops_seals_and_readers(path):
    """sealed.json always names an index that is there and, in the end, everything."""
    write_shards(path, range(4))
    seal(path)
    drops = (drop_one_by_one, path, range(8))
    together(
        (stop_after, path, drops, (write_shards, path, range(4, 10))),
        (repeat, path, seal),
        (repeat, path, seal),
        (repeat, path, read_all),
    )
    assert verify_store(path) == []
    files = open_files(path)
    assert read_sealed(files).folders == [f"{shard:03d}" for shard in range(10)]
    tombstones = sorted(file.name for file in path.glob("tombstones/*.json"))
    assert len(tombstones) == 8 and read_json(path / "sealed.json")["tombstones"] == tombstones
    assert len([file for file in path.iterdir() if file.name.startswith("index-")]) == 1
    keys = check_rows(TokenStore(path))
    assert len(keys) == 10 * ROWS - 16 and not {(s, 3) for s in range(8)} & set(keys)


def test_a_reader_keeps_its_snapshot(path):
    write_shards(path, [2, 5])
    drop(path, "key", ["5-0"])
    before = TokenStore(path)
    together((write_shards, path, [0, 3, 9]), (drop_one_by_one, path, [2, 5]), (seal, path))
    seal(path)
    assert len(before) == 2 * ROWS - 1 and before.shards == ["002", "005"]
    assert len(check_rows(before)) == len(before) == len(before.to_arrow())
    assert before.dataset().count_rows() == len(before.rows_where("class_id >= 0")) == len(before)
    after = TokenStore(path)
    assert after.shards == ["000", "002", "003", "005", "009"]
    assert len(check_rows(after)) == 5 * ROWS - 5


def compact_after_drops(path):
    for shard in range(6):
        drop(path, "key", [f"{shard}-{shard}"])
        compact_store(path)


def open_and_count(path):
    """What is opened is one state of the store; reading on may say to open it again."""
    store = TokenStore(path)
    assert 6 * ROWS - 6 <= len(store) <= 6 * ROWS
    try:
        check_rows(store)
    except FileNotFoundError as error:
        assert "open it again" in str(error)


def test_opening_while_shards_are_rewritten(path):
    write_shards(path, range(6))
    together(
        (stop_after, path, (compact_after_drops, path)),
        (repeat, path, open_and_count),
        (repeat, path, seal),
    )
    assert verify_store(path) == []
    assert len(check_rows(TokenStore(path))) == 6 * ROWS - 6


@pytest.mark.parametrize("touched", [False, True])
def test_a_reader_of_a_shard_that_was_rewritten_is_told(tmp_path, touched):
    create_store(tmp_path, make_meta("zarr"))
    write_shards(tmp_path, [0])
    store = TokenStore(tmp_path)
    if touched:
        store.read_codes([0])
    shutil.rmtree(tmp_path / "shards" / "000")
    with pytest.raises(FileNotFoundError, match="open it again"):
        store.read_codes([0])
