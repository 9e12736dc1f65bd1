"""The permutation and the stream of epochs: bijections, mixing, the same from any position."""

import numpy as np
import pytest

from train_stage.order import permute, stream_rows


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100, 1023, 4097, 50_000])
def test_it_is_a_permutation(size):
    for key in ((0, 0), (0, 1), (7, 0)):
        assert sorted(permute(np.arange(size), size, *key).tolist()) == list(range(size))


def test_any_index_alone_gives_the_same():
    whole = permute(np.arange(1000), 1000, 3, 4)
    for index in (0, 1, 500, 999):
        assert permute(np.array([index]), 1000, 3, 4)[0] == whole[index]


def test_it_mixes():
    size = 20_000
    places = permute(np.arange(size), size, 1, 0)
    assert abs(np.corrcoef(places, np.arange(size))[0, 1]) < 0.03
    # neighbours land a third of the range apart on average, as in a uniform shuffle
    assert np.abs(np.diff(places)).mean() / size == pytest.approx(1 / 3, abs=0.01)
    # each tenth of the store is spread evenly over the tenths of the epoch
    table = np.histogram2d(np.arange(size), places, bins=10)[0]
    assert np.abs(table / (size / 100) - 1).max() < 0.25


def test_keys_give_other_orders():
    a, b, c = (permute(np.arange(1000), 1000, *key) for key in ((0, 0), (0, 1), (1, 0)))
    assert (a == b).mean() < 0.01 and (a == c).mean() < 0.01


def test_beyond_the_end():
    with pytest.raises(ValueError, match="10"):
        permute(np.array([10]), 10, 0)


def test_stream_covers_every_epoch_and_crosses_them():
    rows = stream_rows(np.arange(250), 100, seed=5)
    assert sorted(rows[:100].tolist()) == list(range(100))
    assert sorted(rows[100:200].tolist()) == list(range(100))
    assert rows[:100].tolist() != rows[100:200].tolist()
    np.testing.assert_array_equal(stream_rows(np.arange(90, 110), 100, seed=5), rows[90:110])


def test_a_billion_rows_cost_nothing():
    rows = stream_rows(np.arange(10**15, 10**15 + 256), 10**9, seed=0)
    assert len(set(rows.tolist())) == 256 and rows.max() < 10**9
