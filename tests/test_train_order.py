"""The permutation and the stream of epochs: bijections, mixing, the same from any position."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_stage.loading import order
from train_stage.loading.compiled_loops import compile_loops
from train_stage.loading.order import FullOrder, hash_array, hash_words, permute, runs

quick = settings(deadline=None, max_examples=60)
SIZES = [2, 3, 5, 8, 9, 16, 17, 64, 65, 1000, 1024, 1025, 4097]


def deviation(counts: np.ndarray) -> float:
    """Chi-square of counts against equal ones, in standard deviations: below 5 by chance."""
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@quick
@given(size=st.integers(1, 3000), key=st.lists(st.integers(-(2**70), 2**70), max_size=3))
def test_it_is_a_permutation(size, key):
    places = permute(np.arange(size), size, *key)
    assert places.dtype == np.int64
    assert np.array_equal(np.sort(places), np.arange(size))


@quick
@given(size=st.integers(1, 2**62), seed=st.integers(0), data=st.data())
def test_any_size_alone_or_together(size, seed, data):
    index = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=20))))
    places = permute(index, size, seed)
    assert len(set(places.tolist())) == len(index)
    assert 0 <= places.min() and places.max() < size
    assert [int(permute(one, size, seed)) for one in index] == places.tolist()
    assert permute(index.reshape(-1, 1), size, seed).shape == (len(index), 1)


def test_any_array_of_integers_will_do():
    expected = permute(np.arange(5), 100, 1)
    read_only = np.frombuffer(np.arange(5).tobytes(), np.int64)
    unaligned = np.frombuffer(b"." + np.arange(5).tobytes(), np.int64, offset=1)
    strided, narrow = np.repeat(np.arange(5), 2)[::2], np.arange(5, dtype=np.uint8)
    for index in (read_only, unaligned, strided, narrow, [0, 1, 2, 3, 4]):
        assert np.array_equal(permute(index, 100, 1), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 100, 65_537, 10**9, 2**62])
def test_loops_and_numpy_agree(size, monkeypatch):
    index = np.unique(np.linspace(0, size - 1, 20_000).astype(np.int64).clip(0, size - 1))
    compiled = permute(index, size, 8, 9)
    monkeypatch.setattr(order, "_permute_rectangle", order._network)
    assert np.array_equal(permute(index, size, 8, 9), compiled)


def test_without_numba_the_order_is_the_same():
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from train_stage.loading.order import permute, _network, _permute_rectangle\n"
        "assert _permute_rectangle is _network\n"
        "print(permute(np.arange(5), 10**9, 1, 2).tolist())"
    )
    path = os.pathsep.join(["."] + sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(permute(np.arange(5), 10**9, 1, 2).tolist())


def test_loops_compile_where_nothing_can_be_cached():
    pytest.importorskip("numba")
    namespace: dict = {}
    exec("def add(a, b): return a + b", namespace)  # no file, so no folder beside it for a cache
    assert compile_loops(namespace["add"], print, "i8(i8, i8)")(2, 3) == 5


def test_the_order_stays_what_it_is():
    """Runs are resumed by later versions: these numbers never change."""
    assert permute(np.arange(3), 10**9, 1, 2).tolist() == [785097449, 397108328, 623865976]
    assert permute(np.arange(10), 10, 1, 2).tolist() == [0, 9, 3, 7, 2, 8, 6, 4, 5, 1]
    assert permute(np.array([2**62 - 9]), 2**62, 1).tolist() == [2275735021087901973]
    assert int(hash_words(1, 2, 3)) == 15020427595393229491
    assert int(hash_words(-1, 2**64 + 5)) == 3846658174030194800


def test_hash_array_is_hash_words_of_each():
    words = [0, 1, 2**63, 2**64 - 1]
    hashes = hash_array(np.array(words, np.uint64))
    assert hashes.tolist() == [int(hash_words(word)) for word in words]


@pytest.mark.parametrize("size", SIZES)
def test_over_many_keys_it_is_uniform(size):
    """Where an index goes, and how far apart neighbours and column mates go."""
    keys = max(200, min(5000, 10**5 // size))
    places = np.stack([permute(np.arange(size), size, 11, key) for key in range(keys)])
    bins = min(size, 16)
    cells = np.arange(size) * bins // size * bins + places * bins // size  # (keys, size)
    if size % bins == 0:
        assert deviation(np.bincount(cells.ravel(), minlength=bins * bins)) < 5
    for apart in {1, 1 << (size - 1).bit_length() // 2, size // 2} if size > 2 else ():
        jumps = (places[:, apart:] - places[:, :-apart]) % size
        assert deviation(np.bincount(jumps.ravel(), minlength=size)[1:]) < 6


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 1_281_167, 10**9, 2**40 + 7, 2**62])
def test_one_bit_moves_a_row_anywhere(size):
    index = np.arange(30_000)
    places = permute(index, size, 5)
    bits = (size - 1).bit_length()
    for bit in {0, 1, bits // 2 - 1, bits // 2, bits - 2}:
        other = permute(index ^ (1 << bit), size, 5)
        once = index < index ^ (1 << bit)  # a pair counts once
        jumps = ((places - other) % size)[once] / size
        assert deviation(np.histogram(jumps, 64, (0, 1))[0]) < 5


@pytest.mark.parametrize("size", [2**16, 1_281_167])
def test_an_epoch_looks_like_a_uniform_shuffle(size):
    places = permute(np.arange(size), size, 1, 0)
    next_epoch = permute(np.arange(size), size, 1, 1)
    assert np.abs(np.diff(places)).mean() / size == pytest.approx(1 / 3, abs=5 / size**0.5)
    for other in (np.arange(size), np.roll(places, 1), next_epoch):
        assert abs(np.corrcoef(places, other)[0, 1]) < 5 / size**0.5
        table = np.histogram2d(places, other, 32)[0]
        assert deviation(table) < 5


def test_keys_give_other_orders():
    keys = [(), (0,), (0, 0), (0, 1), (1, 0), (1,)]
    orders = [permute(np.arange(1000), 1000, *key) for key in keys]
    for n, one in enumerate(orders):
        assert all((one == other).mean() < 0.02 for other in orders[:n])


def test_no_two_epochs_are_alike():
    """Nor one of this seed and one of the next."""
    epochs = [FullOrder(1000, seed).places(np.arange(4000)).reshape(4, 1000) for seed in (0, 1)]
    epochs = np.concatenate(epochs)
    for n, one in enumerate(epochs):
        assert all((one == other).mean() < 0.02 for other in epochs[:n])


@pytest.mark.parametrize("index, size", [(10, 10), (-1, 10), (0, 0), (0, 2**62 + 1)])
def test_what_is_no_permutation_is_refused(index, size):
    with pytest.raises(ValueError, match="permut"):
        permute(np.array([index]), size, 0)


def test_runs():
    assert list(runs(np.array([], int))) == []
    assert list(runs(np.array([4]))) == [(4, slice(0, 1))]
    found = list(runs(np.array([7, 7, 2, 7])))
    assert found == [(7, slice(0, 2)), (2, slice(2, 3)), (7, slice(3, 4))]


@quick
@given(size=st.integers(1, 500), seed=st.integers(0), epoch=st.integers(0, 10**12))
def test_every_epoch_has_every_row_once(size, seed, epoch):
    places = FullOrder(size, seed).places(np.arange(epoch * size, (epoch + 2) * size))
    assert np.array_equal(np.sort(places[:size]), np.arange(size))
    assert np.array_equal(np.sort(places[size:]), np.arange(size))
    assert size < 20 or (places[:size] != places[size:]).any()


@quick
@given(
    size=st.integers(1, 300),
    first=st.integers(0, 10**15),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
)
def test_any_slices_give_the_same(size, first, cuts):
    stream, positions = FullOrder(size, 3), np.arange(first, first + 1000)
    whole = stream.places(positions)
    parts = [stream.places(part) for part in np.split(positions, sorted(cuts))]
    assert np.array_equal(np.concatenate(parts), whole)
    backwards = stream.places(positions[::-1])
    assert np.array_equal(backwards[::-1], whole)


@quick
@given(size=st.integers(1, 5000), step=st.integers(0, 10**6), batch=st.sampled_from([24, 240]))
def test_any_number_of_processes_has_the_same_batch(size, step, batch):
    stream, positions = FullOrder(size, 1), np.arange(step * batch, (step + 1) * batch)
    whole = stream.places(positions)
    for world_size in (1, 2, 3, 4, 8):
        shares = [stream.places(part) for part in np.split(positions, world_size)]
        assert np.array_equal(np.concatenate(shares), whole)


def test_a_billion_rows_cost_nothing():
    stream = FullOrder(10**9, seed=0)
    stream.places(np.arange(1))
    began = time.perf_counter()
    rows = stream.places(np.arange(10**15, 10**15 + 256))
    assert time.perf_counter() - began < 0.05
    assert len(set(rows.tolist())) == 256 and rows.max() < 10**9
