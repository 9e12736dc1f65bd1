"""convert, split and merge: the same rows in another store; killed runs are finished."""

import itertools
import shutil
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from filled_store import content, fill_store, kill_at_every_step, make_meta, stamps

from storage.append_column import append_columns
from storage.merge import merge_stores
from storage.new_store import convert_store, split_store
from storage.reader import TokenStore
from storage.schema import StoreMismatch
from storage.seal import seal
from storage.tombstones import drop
from storage.verify import verify_store
from storage.writer import ShardWriter, create_store, expect_shards, expected_shards

OTHER = {"zarr": "arrow", "arrow": "zarr"}


@pytest.fixture(params=["zarr", "arrow"])
def backend(request):
    return request.param


@pytest.fixture
def store(tmp_path, backend):
    return fill_store(tmp_path / "store", backend)


def assert_same_rows(ours, theirs):
    assert ours.table().equals(theirs.table())
    np.testing.assert_array_equal(ours.read_codes(slice(None)), theirs.read_codes(slice(None)))


def keys_of(path):
    table = TokenStore(path).table(["source", "key", "view"])
    return sorted(tuple(row.values()) for row in table.to_pylist())


# convert


def test_convert_keeps_everything(store, tmp_path, backend):
    expect_shards(store, ["later"])
    old = TokenStore(store)
    convert_store(old, tmp_path / "new", OTHER[backend], 32)
    new = TokenStore(tmp_path / "new")
    assert_same_rows(new, old)
    assert new.meta.backend == OTHER[backend] and verify_store(tmp_path / "new") == [
        f"{tmp_path}/new/shards/later is missing: run muse-tokenize again"
    ]
    assert new.content_fingerprint() == old.content_fingerprint()
    assert new.skipped().equals(old.skipped()) and new.missing_shards() == ["later"]
    assert (tmp_path / "new" / "sealed.json").is_file()


@pytest.mark.parametrize("rows_per_shard", [1000, 130, 33])
def test_convert_to_other_shards(store, tmp_path, rows_per_shard):
    drop(store, "key", ["0-0003"], "asked")
    old = TokenStore(store)
    convert_store(old, tmp_path / "new", chunk_rows=7, rows_per_shard=rows_per_shard)
    new = TokenStore(tmp_path / "new")
    assert_same_rows(new, old)
    assert len(new.shards) == -(-128 // rows_per_shard)
    assert new.index.rows.tolist()[:-1] == [rows_per_shard] * (len(new.shards) - 1)
    rejected = old.skipped().to_pylist()
    rejected += 2 * [{"key": "0-0003", "source": "in/00000.tar", "reason": "dropped: asked"}]
    assert sorted(new.skipped().to_pylist(), key=str) == sorted(rejected, key=str)
    assert verify_store(tmp_path / "new") == []


def test_tombstones_go_along(store, tmp_path):
    drop(store, "url", ["https://example.org/2-0001", "https://example.org/later"])
    convert_store(TokenStore(store), tmp_path / "new")
    new = TokenStore(tmp_path / "new")
    assert len(new) == 128 and len(new.numbers.dropped) == 0
    extra = pa.schema([("url", pa.string())])
    with ShardWriter(tmp_path / "new", "later", "later.tar", extra_columns=extra) as writer:
        codes = np.ones((2, 16))
        urls = ["https://example.org/later", None]
        writer.add({"codes": codes, "key": ["a", "b"], "url": urls})
    assert TokenStore(tmp_path / "new").table(["key"])["key"].to_pylist()[-1] == "b"
    assert len(TokenStore(tmp_path / "new")) == 129


def test_convert_again_continues_and_changes_nothing(store, tmp_path, backend):
    convert = partial(convert_store, out=tmp_path / "new", backend=OTHER[backend])
    convert(TokenStore(store))
    before = content(tmp_path / "new"), stamps(tmp_path / "new")
    convert(TokenStore(store))
    assert (content(tmp_path / "new"), stamps(tmp_path / "new")) == before
    fill_store(store, backend, counts=(8,), first=7)
    convert(TokenStore(store))
    assert_same_rows(TokenStore(tmp_path / "new"), TokenStore(store))


def test_convert_refuses_a_folder_of_something_else(store, tmp_path, backend):
    convert_store(TokenStore(store), tmp_path / "new", OTHER[backend])
    with pytest.raises(StoreMismatch, match="chunk_rows"):
        convert_store(TokenStore(store), tmp_path / "new", OTHER[backend], 8)
    with pytest.raises(ValueError, match="made from something else"):
        convert_store(TokenStore(store), tmp_path / "new", OTHER[backend], rows_per_shard=50)
    with pytest.raises(ValueError, match="made from something else"):
        convert_store(TokenStore(store), store)
    append_columns(store, pa.table({"key": ["0-0001"], "tag": ["a"]}))
    with pytest.raises(ValueError, match="made from something else"):
        convert_store(TokenStore(store), tmp_path / "new", OTHER[backend])
    expect_shards(store, ["later"])
    with pytest.raises(ValueError, match="lacks shards"):
        convert_store(TokenStore(store), tmp_path / "third", rows_per_shard=50)


def test_an_empty_store_is_converted(tmp_path, backend):
    create_store(tmp_path / "store", make_meta(backend))
    for name, rows_per_shard in (("a", None), ("b", 10)):
        convert_store(TokenStore(tmp_path / "store"), tmp_path / name, OTHER[backend], 32,
                      rows_per_shard)  # fmt: skip
        assert len(TokenStore(tmp_path / name)) == 0 and verify_store(tmp_path / name) == []


def test_convert_killed_at_every_step(tmp_path, backend):
    store = fill_store(tmp_path / "store", backend, counts=(40, 30))
    drop(store, "key", ["0-0003"])
    new, stride = tmp_path / "new", 1 if backend == "zarr" else 3
    convert = partial(convert_store, TokenStore(store), new, OTHER[backend], 32)
    assert kill_at_every_step(convert, None, new, stride) > 20


# split


def test_split_by_hash(store, tmp_path, backend):
    outs = tmp_path / "a", tmp_path / "b"
    split_store(TokenStore(store), outs, 0.7, seed=3)
    a, b = map(keys_of, outs)
    assert sorted(a + b) == keys_of(store) and 65 < len(a) < 117
    assert not {key[:2] for key in a} & {key[:2] for key in b}  # views stay together
    rejected = [TokenStore(out).skipped().num_rows for out in outs]
    assert sum(rejected) == 3 and [verify_store(out) for out in outs] == [[], []]

    convert_store(TokenStore(store), tmp_path / "cut", rows_per_shard=17)
    split_store(TokenStore(tmp_path / "cut"), (tmp_path / "c", tmp_path / "d"), 0.7, seed=3)
    assert keys_of(tmp_path / "c") == a and keys_of(tmp_path / "d") == b
    split_store(TokenStore(store), (tmp_path / "e", tmp_path / "f"), 0.7, seed=4)
    assert keys_of(tmp_path / "e") != a
    before = content(outs[0])
    with pytest.raises(ValueError, match="made from something else"):
        split_store(TokenStore(store), outs, 0.7, seed=4)
    split_store(TokenStore(store), outs, 0.7, seed=3)
    assert content(outs[0]) == before


def test_split_by_filter(store, tmp_path):
    drop(store, "key", ["0-0003"])
    condition = "class_id == 2 and caption is not None"
    split_store(TokenStore(store), (tmp_path / "a", tmp_path / "b"), where=condition)
    a, b, whole = (TokenStore(path) for path in (tmp_path / "a", tmp_path / "b", store))
    wanted = whole.rows_where(condition)
    assert a.table().equals(whole.table(rows=wanted)) and 0 < len(a)
    np.testing.assert_array_equal(a.read_codes(slice(None)), whole.read_codes(wanted))
    rest = np.setdiff1d(np.arange(len(whole)), wanted)
    np.testing.assert_array_equal(b.read_codes(slice(None)), whole.read_codes(rest))
    assert len(b.skipped()) == len(whole.skipped()) + 2 and len(a.skipped()) == 0


# merge


def merge(out, *paths, **options):
    return merge_stores(out, [TokenStore(path) for path in paths], **options)


def test_merge_links_shards(store, tmp_path, backend):
    other = fill_store(tmp_path / "other", backend, counts=(20, 9), first=3)
    expect_shards(other, ["later"])
    merge(tmp_path / "all", store, other)
    new = TokenStore(tmp_path / "all")
    assert new.shards == ["00000", "00001", "00002", "00003", "00004"]
    assert keys_of(tmp_path / "all") == sorted(keys_of(store) + keys_of(other))
    assert len(new.skipped()) == 5 and expected_shards(tmp_path / "all") == {*new.shards, "later"}
    ours, theirs = tmp_path / "all/shards/00003", other / "shards/00003"
    assert (ours / "rows.parquet").samefile(theirs / "rows.parquet")
    assert content(ours) == content(theirs)
    before = content(tmp_path / "all"), stamps(tmp_path / "all")
    merge(tmp_path / "all", store, other)
    assert (content(tmp_path / "all"), stamps(tmp_path / "all")) == before
    shutil.rmtree(store)
    shutil.rmtree(other)
    assert len(TokenStore(tmp_path / "all").read_codes(slice(None))) == 159


def test_merge_of_shards_with_one_name(store, tmp_path, backend):
    shutil.copytree(store, tmp_path / "copy")
    merge(tmp_path / "one", store, tmp_path / "copy")
    assert len(TokenStore(tmp_path / "one")) == 130
    other = fill_store(tmp_path / "other", backend, counts=(20,))
    with pytest.raises(ValueError, match="both have a shard 00000.*--prefix"):
        merge(tmp_path / "all", store, other)
    assert not (tmp_path / "all").exists()
    merge(tmp_path / "all", store, other, prefix=True)
    new = TokenStore(tmp_path / "all")
    assert new.shards == ["other-00000", "store-00000", "store-00001", "store-00002"]
    np.testing.assert_array_equal(
        new.read_codes(slice(20, None)), TokenStore(store).read_codes(slice(None))
    )
    assert verify_store(tmp_path / "all") == []


def test_merge_names_what_differs(store, tmp_path, backend):
    other = fill_store(tmp_path / "other", backend, first=3, transform={"resize": "box"})
    with pytest.raises(StoreMismatch, match="transform.resize: 'bilinear' != 'box'"):
        merge(tmp_path / "all", store, other)
    third = fill_store(tmp_path / "third", OTHER[backend], first=3, chunk_rows=8)
    with pytest.raises(StoreMismatch, match=f"muse-store convert .*third NEW --backend {backend}"):
        merge(tmp_path / "all", store, third)


def test_merge_leaves_out_dropped_rows(store, tmp_path, backend):
    other = fill_store(tmp_path / "other", backend, counts=(20,), first=3)
    drop(store, "key", ["0-0001", "later"], "asked")
    drop(store, "class_id", [3])
    drop(other, "key", ["3-0002"])
    wanted = sorted(keys_of(store) + keys_of(other))
    left = merge(tmp_path / "all", store, other)
    assert keys_of(tmp_path / "all") == wanted and [found.column for found in left] == ["class_id"]
    new = TokenStore(tmp_path / "all")
    assert len(new.numbers.dropped) == 0 and {t.column for t in new.tombstones} == {"key"}
    assert len(new.skipped()) == 4 + 150 - len(new)
    assert verify_store(tmp_path / "all") == []
    before = content(tmp_path / "all")
    merge(tmp_path / "all", store, other)
    assert content(tmp_path / "all") == before


def test_merge_refuses_a_folder_of_something_else(store, tmp_path, backend):
    other = fill_store(tmp_path / "other", backend, counts=(20,), first=3)
    merge(tmp_path / "all", store)
    with pytest.raises(ValueError, match="made from something else"):
        merge(tmp_path / "all", other)
    merge(tmp_path / "all", store, other)
    assert len(TokenStore(tmp_path / "all")) == 150


def test_merge_killed_at_every_step(tmp_path, backend):
    paths = [fill_store(tmp_path / f"{i}", backend, counts=(9,), first=i) for i in range(2)]
    drop(paths[1], "key", ["1-0003"])
    stores = [TokenStore(path) for path in paths]
    merge_again = partial(merge_stores, tmp_path / "all", stores)
    stride = 1 if backend == "arrow" else 3
    assert kill_at_every_step(merge_again, None, tmp_path / "all", stride) > 20


def test_split_and_merge_give_the_store_back(store, tmp_path):
    seal(store)
    split_store(TokenStore(store), (tmp_path / "a", tmp_path / "b"), 0.5)
    merge(tmp_path / "all", tmp_path / "a", tmp_path / "b", prefix=True)
    assert keys_of(tmp_path / "all") == keys_of(store)
    names = [f"{side}-{name}" for side, name in itertools.product("ab", TokenStore(store).shards)]
    assert TokenStore(tmp_path / "all").shards == names
