"""Rows come back as they went in, whatever their type, shape, chunks, shards and tombstones."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.reader import TokenStore
from storage.row_numbers import RowNumbers
from storage.schema import ArrayColumn, StoreMeta, Tokenizer, codes_dtype
from storage.seal import seal
from storage.tombstones import drop
from storage.verify import verify_store
from storage.writer import ShardWriter, create_store

BACKENDS = st.sampled_from(["zarr", "arrow"])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def layouts(draw):
    """(rows of every shard, the dropped places of every shard or None, rows in a chunk)."""
    rows = draw(st.lists(st.integers(0, 150), max_size=6))
    few = draw(st.integers(0, 40))  # dropped of a shard
    dropped = []
    for count in rows:
        places = st.sets(st.integers(0, max(0, count - 1)), max_size=few if count else 0)
        chosen = draw(st.one_of(st.none(), places))
        dropped.append(np.array(sorted(chosen), np.int64) if chosen else None)
    return rows, dropped, draw(st.integers(1, 100))


@settings(max_examples=150, deadline=None)
@given(layouts(), SEEDS)
def test_row_numbers_against_a_list(layout, seed):
    rows, dropped, chunk_rows = layout
    numbers = RowNumbers(np.array(rows, np.int64), dropped, chunk_rows)
    gone = [set() if places is None else set(places.tolist()) for places in dropped]
    live = [(s, p) for s, count in enumerate(rows) for p in range(count) if p not in gone[s]]
    assert len(numbers) == len(live)

    picks = np.random.default_rng(seed).integers(0, len(live), 50 if live else 0)
    shard, place = numbers.locate(picks)
    assert list(zip(shard.tolist(), place.tolist(), strict=True)) == [live[p] for p in picks]
    found = {}
    for s, chunk, inner, places in numbers.pieces(picks):
        at = np.arange(len(picks))[places]
        inner = np.arange(chunk_rows)[inner]
        assert (s, chunk) not in {key[:2] for key in found.values()}  # one piece a chunk
        found |= {int(p): (s, chunk, int(i)) for p, i in zip(at, inner, strict=True)}
    assert [(s, chunk * chunk_rows + i) for _, (s, chunk, i) in sorted(found.items())] == [
        live[p] for p in picks
    ]

    ascending = np.sort(picks)
    for s, places, inner in numbers.by_shard(ascending):
        kept = numbers.kept_in(s)
        kept = np.arange(rows[s]) if kept is None else kept
        assert [(s, int(p)) for p in kept[inner]] == [live[p] for p in ascending[places]]

    chunks = [(s, c) for s, count in enumerate(rows) for c in range(-(-count // chunk_rows))]
    bounds = numbers.chunk_bounds
    assert len(bounds) == len(chunks) + 1
    for (s, c), first, end in zip(chunks, bounds[:-1], bounds[1:], strict=True):
        assert [(shard, place // chunk_rows) for shard, place in live[first:end]] == [(s, c)] * (
            end - first
        )


@st.composite
def stores(draw):
    """(meta, rows of every shard)."""
    size = draw(st.sampled_from([2, 1024, 2**16, 2**16 + 1, 2**20]))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    tokenizer = Tokenizer("vq", "X", size, [1, int(np.prod(shape))], "f" * 64)
    chunk_rows = draw(st.sampled_from([1, 3, 16, 1024]))
    arrays = {"codes": ArrayColumn(codes_dtype(size), shape)}
    meta = StoreMeta(8, arrays, {"codes": tokenizer}, {}, draw(BACKENDS), chunk_rows)
    return meta, draw(st.lists(st.integers(0, 40), max_size=3))


def write(path, meta, counts, rng):
    """Writes the shards; returns (codes, keys) of all rows."""
    create_store(path, meta)
    size, shape = meta.tokenizers["codes"].codebook_size, meta.arrays["codes"].shape
    parts, keys = [np.empty((0, *shape), np.int64)], []
    for shard, count in enumerate(counts):
        codes = rng.integers(0, size, (count, *shape)) * (rng.random() < 0.8)  # or all zeros
        names = [f"{shard}-{row}" for row in range(count)]
        with ShardWriter(path, str(shard), source=str(shard)) as writer:
            for part in np.array_split(np.arange(count), 2):
                writer.add({"codes": codes[part], "key": [names[row] for row in part]})
        parts.append(codes)
        keys += names
    return np.concatenate(parts), keys


@settings(max_examples=40, deadline=None)
@given(stores(), SEEDS, st.booleans())
def test_round_trip(store, seed, is_sealed):
    (meta, counts), rng = store, np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        codes, keys = write(path, meta, counts, rng)
        if is_sealed:
            seal(path)
        check(path, meta, codes, keys, rng)
        if keys:
            dropped = rng.choice(keys, rng.integers(1, len(keys) + 1)).tolist()
            drop(path, "key", dropped)
            kept = [row for row, key in enumerate(keys) if key not in dropped]
            check(path, meta, codes[kept], [keys[row] for row in kept], rng)
        assert verify_store(path) == []


def check(path, meta, codes, keys, rng):
    """The store holds exactly these rows, however they are asked for."""
    store, rows = TokenStore(path), len(codes)
    assert len(store) == rows and store.meta == meta
    whole = store.read_codes(slice(None))
    assert whole.dtype == meta.arrays["codes"].dtype
    np.testing.assert_array_equal(whole, codes)
    mask = rng.random(rows) < 0.3
    first, end = sorted(rng.integers(-rows - 2, rows + 2, 2).tolist())
    picks = rng.integers(0, rows, 20) if rows else []
    for asked in (mask, slice(first, end), slice(end, first, -3), picks, np.flatnonzero(mask)):
        want = np.arange(rows)[asked] if isinstance(asked, slice) else asked
        np.testing.assert_array_equal(store.read_codes(asked), codes[want])
        some = [keys[row] for row in np.arange(rows)[want]]
        assert store.table(["key"], asked)["key"].to_pylist() == some
        values = store.to_arrow(["codes"], asked)["codes"].to_pylist()
        assert values == [row.reshape(-1).tolist() for row in codes[want]]


@pytest.mark.parametrize("rows", [[0, 5], [-1], 1.5, [0.0], ["0"]])
def test_rows_that_are_none_are_refused(tmp_path, rows):
    arrays = {"codes": ArrayColumn("uint16", [2])}
    meta = StoreMeta(8, arrays, {"codes": Tokenizer("", "", 4, [1, 2], "")})
    write(tmp_path, meta, [5], np.random.default_rng(0))
    store = TokenStore(tmp_path)
    for read in (store.read_codes, lambda rows: store.table(["key"], rows)):
        with pytest.raises(IndexError):
            read(rows)
    with pytest.raises(IndexError, match="mask of 4"):
        store.read_codes([True] * 4)


@pytest.mark.parametrize("codes", [[[70_000]], [[-1]], [[0.5]], [[np.nan]]])
def test_values_that_an_array_cannot_hold_are_refused(tmp_path, codes):
    """Also in an array that is no codes, so that no codebook bounds it."""
    create_store(tmp_path, StoreMeta(8, {"ids": ArrayColumn("uint16", [1])}, {}))
    writer = ShardWriter(tmp_path, "a", source="a")
    with pytest.raises(ValueError, match="cannot hold"):
        writer.add({"ids": np.array(codes), "key": ["a"]})


@pytest.mark.parametrize("name", ["", ".a", "a/b", "a@v1", "a@v12"])
def test_names_that_no_shard_can_have(tmp_path, name):
    create_store(tmp_path, StoreMeta(8, {}, {}))
    with pytest.raises(ValueError, match="shard name"):
        ShardWriter(tmp_path, name, source="a")
