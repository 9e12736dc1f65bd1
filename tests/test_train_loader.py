"""The loader: right rows, the same global batches for any world size, exact state."""

import numpy as np
import pytest
import torch
from store_factory import make_store

from storage.reader import TokenStore
from train_stage.loader import TokenLoader


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(make_store(tmp_path_factory.mktemp("store")))


def test_rows_carry_their_own_codes_and_class(store):
    batch = TokenLoader(store, 32, seed=1).batch(3)
    assert batch.codes.dtype == torch.int64 and batch.codes.shape == (32, 16)
    np.testing.assert_array_equal(batch.codes.numpy(), store.read_codes(batch.rows))
    assert torch.equal(batch.codes[:, 0] // 6, batch.class_ids)


def test_an_epoch_sees_every_row_once(store):
    loader = TokenLoader(store, 50, seed=1)
    rows = np.concatenate([loader.batch(step).rows for step in range(6)])
    assert sorted(rows.tolist()) == list(range(300))


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_same_global_batches_for_any_world_size(store, world_size):
    whole = TokenLoader(store, 48, seed=2)
    ranks = [TokenLoader(store, 48, 2, rank, world_size) for rank in range(world_size)]
    for step in (0, 5, 6, 700):  # 6 straddles two epochs
        parts = [loader.batch(step) for loader in ranks]
        assert torch.equal(torch.cat([part.codes for part in parts]), whole.batch(step).codes)


def test_iteration_resumes_where_it_was(store):
    loader = TokenLoader(store, 32, seed=1)
    batches = [batch.rows for batch, _ in zip(loader, range(20), strict=False)]
    again = TokenLoader(store, 32, seed=1)
    again.load_state_dict({**again.state_dict(), "step": 11})
    np.testing.assert_array_equal(next(iter(again)).rows, batches[11])


def test_state_of_another_run_is_refused(store):
    state = TokenLoader(store, 32, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed was 1, is now 2"):
        TokenLoader(store, 32, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="global_batch_size was 32, is now 64"):
        TokenLoader(store, 64, seed=1).load_state_dict(state)


def test_batches_that_do_not_divide(store):
    with pytest.raises(ValueError, match="nearest are 96 and 104"):
        TokenLoader(store, 100, world_size=8)


def test_subset_is_fixed_and_of_the_right_size(store):
    loader = TokenLoader(store, 50, seed=1, max_rows=100)
    first = np.concatenate([loader.batch(step).rows for step in (0, 1)])
    second = np.concatenate([loader.batch(step).rows for step in (2, 3)])
    assert len(set(first.tolist())) == 100 and set(first.tolist()) == set(second.tolist())
    assert first.tolist() != second.tolist()
    assert max(first) > 150  # from all over the store, not its beginning
