"""Mixtures: exact proportions, every source's stream whole and in order, the same from anywhere."""

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_stage.loading.mixture import BLOCK, Mixture, share_places, shares

quick = settings(deadline=None, max_examples=25)
weights = st.lists(st.floats(0.01, 1), min_size=1, max_size=6)


@quick
@given(weights=weights, seed=st.integers(0, 2**63), block=st.integers(0, 10**9))
def test_proportions_are_exact_in_every_block(weights, seed, block):
    positions = np.arange(block * BLOCK, (block + 1) * BLOCK)
    sources, places = Mixture(weights, seed).split(positions)
    counts = np.bincount(sources, minlength=len(weights))
    exact = np.array(weights) / sum(weights) * BLOCK
    assert counts.sum() == BLOCK and np.abs(counts - exact).max() < 1
    for source, count in enumerate(counts):
        mine = places[sources == source]
        # whole and in order, from where the block before ended
        assert np.array_equal(mine, np.arange(block * count, (block + 1) * count))


@quick
@given(
    weights=weights,
    first=st.integers(0, 10**15),
    cuts=st.lists(st.integers(0, 2400), max_size=6),
)
def test_any_slices_give_the_same(weights, first, cuts):
    first = first // BLOCK * BLOCK - 1200 if first > BLOCK else first  # often across a border
    mixture, positions = Mixture(weights, 5), np.arange(first, first + 2400)
    sources, places = mixture.split(positions)
    for cut in (sorted(cuts), 2, 3, 4, 8):  # or so many processes
        parts = [mixture.split(part) for part in np.split(positions, cut)]
        assert np.array_equal(np.concatenate([part[0] for part in parts]), sources)
        assert np.array_equal(np.concatenate([part[1] for part in parts]), places)
    alone = Mixture(weights, 5).split(positions[-1:])
    assert (alone[0][0], alone[1][0]) == (sources[-1], places[-1])


def test_batches_are_mixed():
    sources, _ = Mixture([1, 3], 0).split(np.arange(4 * BLOCK))
    per_batch = (sources.reshape(-1, 256) == 0).sum(axis=1)
    assert per_batch.mean() == 64
    assert per_batch.std() == pytest.approx((256 * 0.25 * 0.75) ** 0.5, rel=0.15)
    first, second = sources.reshape(4, BLOCK)[:2]
    assert (first == second).mean() == pytest.approx(0.25**2 + 0.75**2, abs=0.02)


def test_one_source_is_the_identity():
    positions = np.arange(10**15, 10**15 + 100)
    sources, places = Mixture([0.3], 0).split(positions)
    assert not sources.any() and np.array_equal(places, positions)


def test_the_order_stays_what_it_is():
    """Runs are resumed by later versions: these numbers never change."""
    sources, places = Mixture([0.5, 0.3, 0.2], 7).split(np.arange(6) + 10**9)
    assert sources.tolist() == [0, 0, 2, 2, 2, 0]
    assert places.tolist() == [499999907, 499999908, 199996970, 199996971, 199996972, 499999909]


def test_seeking_costs_nothing():
    mixture = Mixture([0.7, 0.2, 0.1], 0)
    mixture.split(np.arange(1))
    began = time.perf_counter()
    mixture.split(np.arange(10**15, 10**15 + 256))
    assert time.perf_counter() - began < 0.05


def test_places_left_over_go_to_the_largest_remainders():
    # of 65,536: 0.3, 0.3, 0.7 and 0.7 places more than whole ones
    assert share_places([1000.3, 2000.3, 3000.7, 59534.7]).tolist() == [1000, 2000, 3001, 59535]
    assert share_places([1, 1, 1]).tolist() == [21846, 21845, 21845]


def test_the_least_legal_weight_is_named():
    with pytest.raises(ValueError, match="source 1 is less than one row in 65,536") as error:
        Mixture([0.9, 1e-7, 0.15], 0)
    least = float(re.findall(r"give it (\S+) or more", str(error.value))[0])
    assert share_places([0.9, least, 0.15])[1] == 1


@pytest.mark.parametrize("weights", [[], [0, 1], [-1, 2], [float("nan"), 1], [float("inf"), 1]])
def test_what_is_no_weight_is_refused(weights):
    with pytest.raises(ValueError, match="above 0"):
        Mixture(weights, 0)


def test_shares_are_weights_or_rows_times_repeats():
    assert shares([100, 300], [None, None], [1, 1]) == [0.25, 0.75]
    assert shares([100, 300], [None, None], [3, 1]) == [0.5, 0.5]
    assert shares([100, 300], [4, 1], [1, 1]) == [0.8, 0.2]


def test_shares_of_two_kinds_are_refused():
    for weights, repeats in (([0.5, None], [1, 1]), ([0.5, 0.5], [1, 2])):
        with pytest.raises(ValueError, match="a weight for every store, or repeats alone"):
            shares([100, 300], weights, repeats)
    with pytest.raises(ValueError, match="above 0"):
        shares([100, 300], [None, None], [1, 0])
