"""Columns beside codes and class: those of the batch's rows, however rows are read."""

from itertools import product

import numpy as np
import pyarrow as pa
import pytest
import torch

from storage.reader import TokenStore
from storage.schema import ArrayColumn, StoreMeta, StoreMismatch, Tokenizer
from storage.text_states import read_text_states, states_array, states_type
from storage.writer import ShardWriter, create_store
from train_stage.loading import held_columns
from train_stage.loading.columns import check_columns
from train_stage.loading.config import DatasetConfig
from train_stage.loading.held_columns import smallest
from train_stage.loading.loader import Source, TokenLoader
from train_stage.loading.store_stream import Reading

ARRAYS = {
    "codes": ArrayColumn("uint16", [16]),
    "text_ids_clip": ArrayColumn("uint32", [8]),
    "text_pooled_clip": ArrayColumn("float16", [6]),
    "topk_codes": ArrayColumn("uint16", [16, 2]),
}
NUMBERS = ["aesthetic", "sharp", "original_width"]
STATES = ["text_states_clip"]
COLUMNS = [*ARRAYS, *NUMBERS, *STATES][1:]
EXTRA = pa.schema(
    [
        ("aesthetic", pa.float32()),
        ("sharp", pa.bool_()),
        ("text_length_clip", pa.int16()),
        ("text_states_clip", states_type(5)),
    ]
)
READINGS = {
    "ram": Reading(preload="ram"),
    "default": Reading(),
    "window": Reading(shuffle="window", window_chunks=3),
    "gpu": Reading(preload="gpu"),
    "one view": Reading(views="one"),
    "windows, one view": Reading(shuffle="window", window_chunks=3, views="one"),
}


def make_text_store(path, backend="arrow", rows=210, seed=0, **changed):
    """Two shards and an empty one; three views an image; texts of 0 to 8 tokens; nulls."""
    text = {
        "tokenizers": {"clip": {"name": str(path), "fingerprint": "a", "length": 8} | changed},
        "encoders": {"clip": {"fingerprint": "b"}},
    }
    tokenizer = Tokenizer("vq", "VQ", 1000, [4, 4], "f" * 64)
    transform = {"text": text}
    meta = StoreMeta(8, ARRAYS, {"codes": tokenizer}, transform, backend, chunk_rows=16)
    create_store(path, meta)
    rng = np.random.default_rng(seed)
    for shard, count in enumerate((rows // 2, 0, rows - rows // 2)):
        with ShardWriter(path, f"{shard:05d}", f"{shard}.tar", EXTRA) as writer:
            lengths = rng.integers(0, 9, count)
            states = rng.normal(size=(lengths.sum(), 5)).astype(np.float16)
            columns = {
                "codes": rng.integers(0, 1000, (count, 16)),
                "text_ids_clip": rng.integers(0, 2**31, (count, 8)),
                "text_pooled_clip": rng.normal(size=(count, 6)).astype(np.float16),
                "topk_codes": rng.integers(0, 1000, (count, 16, 2)),
                "key": [f"{shard}-{row // 3}" for row in range(count)],
                "class_id": rng.integers(0, 9, count),
                "aesthetic": pa.array(rng.normal(size=count).astype(np.float32)),
                "sharp": [None if row % 7 == 0 else bool(row % 2) for row in range(count)],
                "original_width": [None if row % 5 == 0 else 100 * row for row in range(count)],
                "text_length_clip": lengths.astype(np.int16),
                "text_states_clip": states_array(states, lengths),
            }
            if count:
                writer.add(columns)
    return path


@pytest.fixture(scope="module", params=["arrow", "zarr"])
def store(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    return TokenStore(make_text_store(folder / "store", request.param))


def expected(store, rows):
    """The columns of rows, as the store itself reads them."""
    found = {name: store.read_codes(rows, name) for name in list(ARRAYS)[1:]}
    for name in NUMBERS:
        values = store.table([name], rows)[name].to_pylist()
        found[name] = np.array([np.nan if v is None else v for v in values], np.float32)
    states, lengths = read_text_states(store, "clip", rows, length=8)
    return found | {"text_states_clip": states, "text_length_clip": lengths}


def check_batch(store, batch, mine=slice(None)):
    wanted = expected(store, batch.rows[mine])
    assert set(batch.columns) == set(wanted)
    for name, values in wanted.items():
        found = batch.columns[name].numpy()[mine]
        assert found.dtype == values.dtype, name
        np.testing.assert_array_equal(found, values, err_msg=name)
    np.testing.assert_array_equal(batch.codes.numpy()[mine], store.read_codes(batch.rows[mine]))


@pytest.fixture(autouse=True)
def small_spans(monkeypatch):
    monkeypatch.setattr(held_columns, "SPAN", 37)  # states are read in several parts


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("filter", [None, "class_id < 6"])
def test_columns_are_those_of_the_rows(store, name, filter):
    device = torch.device("cpu")
    options = {"seed": 3, "reading": READINGS[name], "filter": filter, "device": device}
    whole = TokenLoader(store, 24, columns=COLUMNS, **options)
    ranks = [
        TokenLoader(store, 24, rank=r, world_size=2, columns=COLUMNS, **options) for r in (0, 1)
    ]
    plain = TokenLoader(store, 24, **options)
    assert plain.state_dict() == whole.state_dict()
    for step in (0, 1, 2, 3, 17, 3):
        batch, parts = whole.batch(step), [loader.batch(step) for loader in ranks]
        check_batch(store, batch)
        assert plain.batch(step).columns == {}
        np.testing.assert_array_equal(plain.batch(step).rows, batch.rows)
        for column, values in batch.columns.items():
            together = torch.cat([part.columns[column] for part in parts])
            assert together.numpy().tobytes() == values.numpy().tobytes()


@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_columns_of_a_mixture(tmp_path, store, shuffle):
    other = TokenStore(make_text_store(tmp_path / "other", "zarr", rows=60, seed=1))
    sources = [Source(store, filter="class_id < 8"), Source(other, repeat=3.0)]
    reading = Reading(shuffle=shuffle, window_chunks=2)
    whole = TokenLoader(sources, 24, 5, reading=reading, columns=COLUMNS)
    ranks = [TokenLoader(sources, 24, 5, r, 2, reading, columns=COLUMNS) for r in (0, 1)]
    for step in (0, 9):
        batch = whole.batch(step)
        assert set(batch.sources) == {0, 1}
        for number, each in enumerate((store, other)):
            check_batch(each, batch, batch.sources == number)
        for name, values in batch.columns.items():
            together = torch.cat([loader.batch(step).columns[name] for loader in ranks])
            assert together.numpy().tobytes() == values.numpy().tobytes()
    alone = TokenLoader(sources, 2, 5, 0, 2, reading, columns=COLUMNS)  # one row, of one store
    for batch in [alone.batch(step) for step in range(8)]:
        check_batch((store, other)[batch.sources[0]], batch)


def test_what_a_batch_has_is_not_overwritten(store):
    loader = TokenLoader(store, 24, 3, columns=COLUMNS)
    for batch in [loader.batch(step) for step in range(6)]:
        check_batch(store, batch)


def test_a_column_that_is_missing_or_has_words_is_refused(store):
    with pytest.raises(StoreMismatch, match="no column 'text_ids_t5'; there are codes, text_ids"):
        TokenLoader(store, 8, columns=["text_ids_t5"])
    with pytest.raises(StoreMismatch, match="'key' is string; batches take numbers"):
        TokenLoader(store, 8, columns=["key"])


def test_stores_of_other_texts_are_not_mixed(tmp_path, store):
    """Another tokenizer is refused; another place of the same one is not, nor a column unasked."""
    other = TokenStore(make_text_store(tmp_path / "other", rows=20, fingerprint="c"))
    for name in ("text_ids_clip", "text_pooled_clip", "text_states_clip", "text_length_clip"):
        with pytest.raises(StoreMismatch, match=f"{name}'s text record.*'fingerprint': 'c'"):
            check_columns([store, other], [name])
    check_columns([store, other], NUMBERS)
    check_columns([store, TokenStore(make_text_store(tmp_path / "same", rows=20))], COLUMNS)
    narrow = ARRAYS | {"text_pooled_clip": ArrayColumn("float16", [3])}
    meta = StoreMeta(8, narrow, store.meta.tokenizers, store.meta.transform)
    create_store(tmp_path / "narrow", meta)
    with pytest.raises(StoreMismatch, match=r"text_pooled_clip .*shape=\(3,\).* != "):
        check_columns([store, TokenStore(tmp_path / "narrow")], ["text_pooled_clip"])


def test_text_states_beyond_the_limit_are_refused_before_they_are_read(store):
    with pytest.raises(ValueError, match="dataset.shuffle=window"):
        TokenLoader(store, 8, reading=Reading(states_gb=1e-9), columns=STATES)
    windows = Reading(shuffle="window", window_chunks=10, states_gb=1e-5)
    with pytest.raises(ValueError, match="take dataset.window_chunks=[1-9],"):
        TokenLoader(store, 8, reading=windows, columns=STATES)
    TokenLoader(store, 8, reading=windows, columns=NUMBERS)
    with pytest.raises(ValueError, match="dataset.states_gb"):
        DatasetConfig(states_gb=-1)


def test_numbers_are_kept_in_the_smallest_dtype():
    cases = {
        "uint8": [0, 255],
        "int8": [-128, 3],
        "float16": [0.5, np.nan, 2048],
        "uint16": [65535, 257],
        "int16": [-32767, 4],
        "float32": [0.1, 70_000],
    }
    for dtype, dtypes in product(cases, (np.float32, np.int64)):
        values = np.array(cases[dtype], np.float32)
        if dtypes is np.int64 and "float" in dtype:
            continue
        kept = smallest(values.astype(dtypes))
        assert kept.dtype == dtype
        np.testing.assert_array_equal(kept.astype(dtypes), values)
