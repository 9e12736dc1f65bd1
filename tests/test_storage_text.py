"""What text needs of a store: padded ids packed, long rows read a row group at a time."""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from filled_store import make_meta

from storage.append_column import append_columns
from storage.merge import merge_stores
from storage.parquet_file import GROUP_BYTES
from storage.reader import TokenStore
from storage.schema import ArrayColumn
from storage.shard import read_rows
from storage.text_states import read_text_states, states_array, states_type
from storage.tombstones import drop
from storage.verify import verify_store
from storage.writer import ShardWriter, create_store

ROWS, WIDTH = 240, 512
NOTE = pa.struct([("a", pa.int8()), ("b", pa.string())])
EXTRA = pa.schema([("text_states_t5", states_type(WIDTH)), ("note", NOTE)])


@functools.cache
def make_states(rows, seed):
    """(vectors, lengths): about 32 MB for 240 rows, so several row groups."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 260, rows)
    return rng.standard_normal((lengths.sum(), WIDTH), np.float32).astype(np.float16), lengths


@pytest.fixture(scope="module")
def store_of_states(tmp_path_factory):
    path = tmp_path_factory.mktemp("states")
    create_store(path, make_meta("zarr"))
    for shard in range(2):
        with ShardWriter(path, str(shard), f"{shard}.tar", extra_columns=EXTRA) as writer:
            row = {"codes": np.zeros((ROWS, 16), int), "key": [f"{shard}-{i}" for i in range(ROWS)]}
            notes = [{"a": i % 100, "b": f"{i}"} for i in range(ROWS)]
            states = states_array(*make_states(ROWS, shard))
            writer.add({**row, "text_states_t5": states, "note": notes})
    drop(path, "key", ["0-1", "1-5"])
    return path


def expected_states(row):
    """Of row number `row`, with two rows dropped."""
    shard, place = (0, row + (row >= 1)) if row < ROWS - 1 else (1, row - ROWS + 1)
    place += shard and place >= 5
    vectors, lengths = make_states(ROWS, shard)
    first = lengths[:place].sum()
    return vectors[first : first + lengths[place]]


def test_states_come_back_by_row(store_of_states):
    store, rows = TokenStore(store_of_states), [400, 0, 1, 477, 239, 238, 150, 0]
    assert all(len(store.manifest(s)["parquet"]["rows.parquet"]["row_groups"]) > 1 for s in (0, 1))
    states, lengths = read_text_states(store, "t5", rows)
    for row, padded, length in zip(rows, states, lengths, strict=True):
        expected = expected_states(row)
        assert length == len(expected) and not padded[length:].any()
        np.testing.assert_array_equal(padded[:length], expected)
    whole = store.table(["key", "note", "text_states_t5"])
    assert whole.take(rows).equals(store.table(["key", "note", "text_states_t5"], rows))
    assert store.table(["key"], []).num_rows == 0


def test_rows_of_a_long_column_read_only_their_row_groups(store_of_states, tmp_path):
    store = TokenStore(store_of_states)
    folder, manifest = "shards/0", store.manifest(0)
    asked = []

    class Counting(type(store.files)):
        def read_ranges(self, name, ranges):
            asked.append(sum(length for _, length in ranges))
            return super().read_ranges(name, ranges)

    files = Counting(store_of_states)
    read_rows(files, folder, manifest, ["text_states_t5"])
    read_rows(files, folder, manifest, ["text_states_t5"], np.array([7]))
    assert asked[1] < asked[0] / 2 and asked[1] < GROUP_BYTES * 1.1
    # damage elsewhere is not seen, and here it is
    spans = manifest["parquet"]["rows.parquet"]["columns"]["text_states_t5"]
    file = store_of_states / folder / "rows.parquet"
    content = file.read_bytes()
    try:
        file.write_bytes(content[: spans[0][0]] + b"x" + content[spans[0][0] + 1 :])
        last = np.array([ROWS - 1])
        assert read_rows(files, folder, manifest, ["text_states_t5"], last).num_rows == 1
        with pytest.raises(ValueError, match=r"rows.parquet is damaged"):
            read_rows(files, folder, manifest, ["text_states_t5"], np.array([0, ROWS - 1]))
    finally:
        file.write_bytes(content)


def test_manifests_without_row_groups_are_read_whole(store_of_states):
    store = TokenStore(store_of_states)
    manifest = store.manifest(1)
    del manifest["parquet"]["rows.parquet"]["row_groups"]
    old = read_rows(store.files, "shards/1", manifest, ["key", "note"], np.array([3, 230]))
    assert old.to_pylist() == [
        {"key": f"1-{i}", "note": {"a": i % 100, "b": f"{i}"}} for i in (3, 230)
    ]


def test_a_rewritten_store_keeps_its_states(tmp_path):
    for name in ("a", "b"):
        create_store(tmp_path / name, make_meta("arrow"))
        with ShardWriter(tmp_path / name, name, "x", extra_columns=EXTRA) as writer:
            row = {"codes": np.zeros((3, 16), int), "key": [f"{name}{i}" for i in range(3)]}
            vectors = np.arange(4 * WIDTH, dtype=np.float16).reshape(4, WIDTH)
            writer.add({**row, "text_states_t5": states_array(vectors, np.array([3, 0, 1]))})
    append_columns(tmp_path / "a", pa.table({"key": ["a0"], "score": [0.5]}))
    merge_stores(tmp_path / "both", [TokenStore(tmp_path / name) for name in "ab"])
    store = TokenStore(tmp_path / "both")
    assert store.columns["text_states_t5"] == str(states_type(WIDTH))
    states, lengths = read_text_states(store, "t5", slice(None), 4)
    assert lengths.tolist() == [3, 0, 1] * 2
    np.testing.assert_array_equal(states[3, :3], vectors[:3])
    assert verify_store(tmp_path / "both") == []
    with ShardWriter(tmp_path / "both", "c", "x") as writer:
        writer.add({"codes": np.zeros((1, 16), int), "key": ["c0"]})
    with pytest.raises(ValueError, match="1 rows have no text_states_t5"):
        read_text_states(TokenStore(tmp_path / "both"), "t5", [0, 6])


def test_padded_ids_take_little_and_codes_their_bits(tmp_path):
    """An array's first chunk says how zarr shuffles it; every reader finds out by itself."""
    rng, rows = np.random.default_rng(0), 500
    words = rng.integers(0, 49408, (40, 3))  # captions repeat words
    ids = np.full((rows, 77), 49407)
    ids[:, :12] = words[rng.integers(0, 40, (rows, 4))].reshape(rows, 12)
    meta = make_meta("zarr", chunk_rows=256)
    meta.arrays["text_ids_clip"] = ArrayColumn("uint16", [77])
    meta.arrays["text_pooled_clip"] = ArrayColumn("float16", [8])
    create_store(tmp_path, meta)
    codes, pooled = rng.integers(0, 1024, (rows, 16)), rng.standard_normal((rows, 8))
    with ShardWriter(tmp_path, "0", source="x") as writer:
        row = {"key": [str(i) for i in range(rows)], "codes": codes}
        writer.add({**row, "text_ids_clip": ids, "text_pooled_clip": pooled})
    store, folder = TokenStore(tmp_path), tmp_path / "shards" / "0"
    for name, wanted in (("codes", codes), ("text_ids_clip", ids)):
        np.testing.assert_array_equal(store.read_codes(slice(None), name), wanted)
        np.testing.assert_array_equal(zarr.open_array(folder / f"{name}.zarr")[:], wanted)
    found = store.read_codes([7], "text_pooled_clip")
    np.testing.assert_array_equal(found, pooled[[7]].astype(np.float16))
    size = sum(f.stat().st_size for f in (folder / "text_ids_clip.zarr").rglob("c/0/0"))
    assert size / rows < 30  # bit-shuffled, it is 79
    assert (folder / "codes.zarr" / "c" / "0" / "0").stat().st_size * 8 / codes.size < 10.6


def test_rows_without_nested_columns_keep_their_dictionaries(tmp_path):
    create_store(tmp_path, make_meta("zarr"))
    with ShardWriter(tmp_path, "0", source="a source that every row repeats") as writer:
        writer.add({"codes": np.zeros((500, 16), int), "key": [str(i) for i in range(500)]})
    footer = pq.read_metadata(tmp_path / "shards" / "0" / "rows.parquet")
    assert footer.num_row_groups == 1
    column = footer.row_group(0).column(footer.schema.names.index("source"))
    assert "RLE_DICTIONARY" in column.encodings
