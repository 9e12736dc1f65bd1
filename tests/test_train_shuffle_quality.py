"""The measures of a shuffle, on orders whose values are known."""

import numpy as np
import pytest

from train_stage.loading import shuffle_quality
from train_stage.loading.order import FullOrder
from train_stage.loading.shuffle_quality import (
    batch_noise,
    displacement,
    distinct_per_batch,
    expected_distinct,
    longest_run,
    neighbour_correlation,
)
from train_stage.loading.window_order import WindowOrder

ROWS = 100_000
UNSHUFFLED = np.arange(ROWS)
CLASSES = UNSHUFFLED // 1000  # 100 classes
UNIFORM = np.random.default_rng(0).permutation(ROWS)


def test_displacement():
    assert displacement(UNSHUFFLED) == 0
    assert displacement(UNSHUFFLED[::-1]) == pytest.approx(1 / 2)
    assert displacement(UNIFORM) == pytest.approx(1 / 3, abs=0.005)


def test_neighbour_correlation():
    assert neighbour_correlation(UNSHUFFLED) == pytest.approx(1)
    assert neighbour_correlation(UNIFORM) == pytest.approx(0, abs=0.02)


def test_distinct_per_batch():
    assert distinct_per_batch(np.array([1, 1, 2, 3, 3, 3, 9]), 3) == 1.5  # the 9 is in no batch
    assert distinct_per_batch(CLASSES, 100) == 1
    expected = expected_distinct(CLASSES, 100)
    assert expected == pytest.approx(100 * (1 - 0.99**100), rel=0.002)
    assert distinct_per_batch(CLASSES[UNIFORM], 100) == pytest.approx(expected, rel=0.01)


def test_expected_distinct_of_few_rows():
    assert expected_distinct(np.array([0, 0, 5]), 1) == 1
    assert expected_distinct(np.array([0, 0, 5]), 2) == pytest.approx(5 / 3)
    assert expected_distinct(np.array([0, 0, 5]), 3) == 2


def test_longest_run():
    assert longest_run(np.array([4])) == 1
    assert longest_run(np.array([1, 1, 2, 2, 2, 1])) == 3
    assert longest_run(CLASSES) == 1000


def test_batch_noise():
    assert batch_noise(CLASSES, 100) == pytest.approx(100, rel=0.01)  # a batch is one class
    assert batch_noise(CLASSES[UNIFORM], 100) == pytest.approx(1, abs=0.2)
    assert batch_noise(np.tile([0, 1], 500), 100) == 0  # every batch is balanced


def test_the_full_order_is_as_good_as_uniform():
    rows = FullOrder(ROWS, 4).places(UNSHUFFLED)
    assert displacement(rows) == pytest.approx(1 / 3, abs=0.005)
    assert neighbour_correlation(rows) == pytest.approx(0, abs=0.02)
    distinct = distinct_per_batch(CLASSES[rows], 100)
    assert distinct == pytest.approx(expected_distinct(CLASSES, 100), rel=0.01)
    assert longest_run(CLASSES[rows]) <= 5
    assert batch_noise(CLASSES[rows], 100) == pytest.approx(1, abs=0.2)


def test_wider_windows_shuffle_better():
    bounds = np.arange(0, ROWS + 1, 100)
    rows = [WindowOrder(bounds, width, 0).places(UNSHUFFLED) for width in (4, 16, 64, 1000)]
    noise = [batch_noise(CLASSES[order], 100) for order in rows]
    distinct = [distinct_per_batch(CLASSES[order], 100) for order in rows]
    assert noise == sorted(noise, reverse=True) and distinct == sorted(distinct)
    assert noise[:3] == pytest.approx([1 + 100 / 4, 1 + 100 / 16, 1 + 100 / 64], rel=0.2)
    assert noise[3] == pytest.approx(1, abs=0.2)  # one window is a full shuffle


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(shuffle_quality, "ROWS", 128_000)
    shuffle_quality.main()
    out = capsys.readouterr().out
    for name in ("uniform", "full", "window 4, unsorted", "window 256", "take windows of more"):
        assert name in out
