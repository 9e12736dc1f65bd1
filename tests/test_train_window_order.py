"""The order by windows of chunks: coverage, seeking, and what a reader must hold."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_stage.loading.window_order import WindowOrder

quick = settings(deadline=None, max_examples=60)


sizes = st.lists(st.just(0) | st.integers(0, 30), min_size=1, max_size=40).filter(any)
bounds = sizes.map(lambda sizes: np.append(0, np.cumsum(sizes)))
arguments = st.tuples(bounds, st.integers(1, 5) | st.integers(1, 50), st.integers(0, 2**63))
orders = arguments.map(lambda given: WindowOrder(*given))


@quick
@given(order=orders, epoch=st.integers(0, 10**12))
def test_every_epoch_has_every_row_once(order, epoch):
    places = order.places(np.arange(epoch * order.size, (epoch + 2) * order.size))
    assert places.dtype == np.int64
    assert np.array_equal(np.sort(places[: order.size]), np.arange(order.size))
    assert np.array_equal(np.sort(places[order.size :]), np.arange(order.size))


@quick
@given(
    arguments=arguments,
    first=st.integers(0, 10**15),
    cuts=st.lists(st.integers(0, 960), max_size=6),
)
def test_any_slices_give_the_same(arguments, first, cuts):
    order, positions = WindowOrder(*arguments), np.arange(first, first + 960)
    whole = order.places(positions)
    assert np.array_equal(WindowOrder(*arguments).places(positions[::-1])[::-1], whole)
    for cut in (sorted(cuts), 2, 3, 4, 8):  # or so many processes
        parts = [order.places(part) for part in np.split(positions, cut)]
        assert np.array_equal(np.concatenate(parts), whole)


@quick
@given(order=orders, first=st.integers(0, 10**9), length=st.integers(1, 500))
def test_windows_hold_exactly_the_rows_of_their_chunks(order, first, length):
    windows = order.windows(first, first + length)
    assert windows[0].first <= first < windows[0].end
    assert windows[-1].first < first + length <= windows[-1].end
    for window, following in zip(windows, windows[1:], strict=False):
        assert window.end == following.first
    for window in windows:
        assert window.end > window.first and (np.diff(window.chunks) > 0).all()
        held = [np.arange(*order.bounds[chunk : chunk + 2]) for chunk in window.chunks]
        assert all(len(rows) for rows in held)
        found = order.places(np.arange(window.first, window.end))
        assert np.array_equal(np.sort(found), np.concatenate(held))


@quick
@given(order=orders, position=st.integers(0, 10**9))
def test_the_next_window_is_asked_for_by_the_end_of_this(order, position):
    (window,) = order.windows(position, position + 1)
    (following,) = order.windows(window.end, window.end + 1)
    assert following.first == window.end


@given(chunks=st.integers(1, 2000), width=st.integers(1, 300))
@quick
def test_windows_are_no_wider_than_asked_and_none_is_small(chunks, width):
    order = WindowOrder(np.arange(chunks + 1) * 2, width, 0)
    widths = [len(window.chunks) for window in order.windows(0, order.size)]
    assert sum(widths) == chunks and max(widths) <= width
    assert max(widths) - min(widths) <= 1


def test_rows_chunks_and_epochs_are_shuffled():
    order = WindowOrder(np.arange(101) * 100, 10, 0)
    epochs = order.places(np.arange(20_000)).reshape(2, 10, 1000)
    for windows in epochs:
        assert abs(np.corrcoef(windows.ravel(), np.arange(10_000))[0, 1]) < 0.5
        for rows in windows:
            assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.15
    chunks = [set((windows[0] // 100).tolist()) for windows in epochs]
    assert len(chunks[0]) == len(chunks[1]) == 10 and len(chunks[0] & chunks[1]) < 6
    other = WindowOrder(np.arange(101) * 100, 10, 1).places(np.arange(10_000))
    assert (other == epochs[0].ravel()).mean() < 0.02


def test_no_two_windows_are_shuffled_alike():
    """Neither in an epoch, nor in the next, nor in the order of the next seed."""
    orders = [WindowOrder(np.arange(4) * 1000, 1, seed) for seed in (0, 1)]
    windows = [order.places(np.arange(9000)).reshape(9, 1000) % 1000 for order in orders]
    windows = np.concatenate(windows)
    for n, one in enumerate(windows):
        assert all((one == other).mean() < 0.02 for other in windows[:n])


def test_the_order_stays_what_it_is():
    """Runs are resumed by later versions: these numbers never change."""
    places = WindowOrder(np.array([0, 3, 3, 10, 14, 20]), 2, 5).places(np.arange(20))
    assert places.tolist() == [5, 6, 9, 3, 8, 7, 4, 16, 15, 18, 14, 19, 17, 2, 0, 11, 12, 10, 1, 13]


@pytest.mark.parametrize("bounds", [[], [0], [0, 0], [1, 5], [0, 5, 3]])
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds"):
        WindowOrder(np.array(bounds, np.int64), 4, 0)


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="1 or more"):
        WindowOrder(np.array([0, 5]), 0, 0)


def test_a_billion_rows_in_a_million_chunks_are_sought_at_once():
    order = WindowOrder(np.arange(10**6 + 1) * 1000, 64, seed=0)
    order.places(np.arange(1))
    seconds = []
    for epoch in (10, 1000, 10**6):
        began = time.perf_counter()
        rows = order.places(np.arange(256) + epoch * 10**9 + 123_456_789)
        seconds.append(time.perf_counter() - began)
        assert len(set(rows.tolist())) == 256 and rows.max() < 10**9
    assert min(seconds) < 0.05
    kept = sum(array.nbytes for array in order._epoch(10))
    assert kept / 10**6 < 5  # bytes a chunk
