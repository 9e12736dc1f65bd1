"""Batches: right rows, right classes, the same whatever reads them and however."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from store_factory import make_store

from storage.reader import TokenStore
from storage.schema import StoreMismatch
from storage.seal import seal
from storage.tombstones import drop
from storage.writer import ShardWriter
from train_stage.loading.compiled_loops import copy_rows, copy_rows_numpy, gather
from train_stage.loading.loader import Source, TokenLoader
from train_stage.loading.rows_in_memory import available_memory, check_fits, control_groups
from train_stage.loading.store_stream import Reading

WINDOW = Reading(shuffle="window", window_chunks=2)


@pytest.fixture(scope="module", params=["arrow", "zarr"])
def store(request, tmp_path_factory):
    return TokenStore(make_store(tmp_path_factory.mktemp("store"), backend=request.param))


@pytest.fixture(scope="module")
def arrow(tmp_path_factory):
    return TokenStore(make_store(tmp_path_factory.mktemp("arrow")))


def rows_of(loader, steps):
    return np.concatenate([loader.batch(step).rows for step in range(steps)])


@pytest.mark.parametrize("shuffle", ["full", "window"])
@pytest.mark.parametrize("narrow", [False, True])
def test_batches_hold_what_the_store_holds(store, shuffle, narrow):
    for preload in ("auto", "ram") + (("none",) if shuffle == "window" else ()):
        reading = Reading(shuffle=shuffle, window_chunks=2, preload=preload)
        batch = TokenLoader(store, 32, seed=1, reading=reading, narrow=narrow).batch(3)
        assert batch.codes.dtype == (torch.uint16 if narrow else torch.int64)
        codes = batch.codes.long().numpy()
        np.testing.assert_array_equal(codes, store.read_codes(batch.rows))
        assert (codes // 6 == batch.class_ids.numpy()[:, None]).all()
        assert batch.class_ids.dtype == torch.int64 and (batch.sources == 0).all()


@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_an_epoch_is_every_row_once(store, shuffle):
    loader = TokenLoader(store, 50, seed=1, reading=Reading(shuffle=shuffle, window_chunks=3))
    first, second = rows_of(loader, 6), np.concatenate([loader.batch(s).rows for s in range(6, 12)])
    assert sorted(first) == sorted(second) == list(range(300))
    assert list(first) != list(second) and loader.epoch(6) == 1.0


@pytest.mark.parametrize("reading", [Reading(), WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_any_number_of_processes_sees_the_same_batches(store, world_size, reading):
    whole = TokenLoader(store, 48, 2, reading=reading)
    ranks = [TokenLoader(store, 48, 2, r, world_size, reading) for r in range(world_size)]
    for step in (0, 5, 100):
        parts = [loader.batch(step) for loader in ranks]
        np.testing.assert_array_equal(
            np.concatenate([p.rows for p in parts]), whole.batch(step).rows
        )
        assert torch.equal(torch.cat([p.codes for p in parts]), whole.batch(step).codes)


@pytest.mark.parametrize("reading", [Reading(), WINDOW], ids=["full", "window"])
def test_where_the_codes_are_kept_does_not_matter(tmp_path, reading):
    """Backend, preload and the steps read before change nothing."""
    stores = [TokenStore(make_store(tmp_path / b, backend=b)) for b in ("arrow", "zarr")]
    device = torch.device("cpu")
    loaders = [
        TokenLoader(s, 40, 3, reading=Reading(**vars(reading) | {"preload": p}), device=device)
        for s in stores
        for p in ("auto", "ram", "gpu")
    ]
    for step in (9, 2, 3, 4000, 0):
        batches = [loader.batch(step) for loader in loaders]
        for batch in batches[1:]:
            assert torch.equal(batch.codes, batches[0].codes)
            assert torch.equal(batch.class_ids, batches[0].class_ids)
            np.testing.assert_array_equal(batch.rows, batches[0].rows)


def test_a_batch_is_not_overwritten_by_later_ones(store):
    loader = TokenLoader(store, 32, seed=1)
    batches = [loader.batch(step) for step in range(8)]
    for step, batch in enumerate(batches):
        assert torch.equal(batch.codes, TokenLoader(store, 32, seed=1).batch(step).codes)


def test_resumed_equals_uninterrupted(store):
    loader = TokenLoader(store, 32, seed=1)
    batches = [batch for batch, _ in zip(loader, range(10), strict=False)]
    again = TokenLoader(store, 32, seed=1)
    again.load_state_dict({**loader.state_dict(), "step": 6})
    for batch, expected in zip(again, batches[6:], strict=False):
        assert batch.step == expected.step and torch.equal(batch.codes, expected.codes)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"global_batch_size": 64},
        {"reading": WINDOW},
        {"filter": "class_id < 5"},
        {"max_rows": 100},
    ],
)
def test_a_state_of_another_order_is_refused(store, other):
    state = TokenLoader(store, 32, seed=1).state_dict()
    options = {"global_batch_size": 32, "seed": 1} | other
    with pytest.raises(ValueError, match="cannot go on"):
        TokenLoader(store, **options).load_state_dict(state)


def test_dropped_rows_are_gone_and_the_state_says_so(tmp_path):
    path = make_store(tmp_path)
    loader = TokenLoader(TokenStore(path), 32, seed=1)
    drop(path, "key", ["0-3", "1-7"])
    after = TokenLoader(TokenStore(path), 32, seed=1)
    seen = after.streams[0].store.table(["key"], rows_of(after, 40))["key"].to_pylist()
    assert len(set(seen)) == 298 and not {"0-3", "1-7"} & set(seen)
    with pytest.raises(ValueError, match="accept_changes"):
        after.load_state_dict(loader.state_dict() | {"step": 4})
    after.load_state_dict(loader.state_dict() | {"step": 4}, accept_changes=True)
    assert after.step == 4


def test_indivisible_batch_names_the_nearest(store):
    with pytest.raises(ValueError, match="96 and 104"):
        TokenLoader(store, 100, world_size=8)


def test_a_subset_is_fixed_by_the_seed(store):
    loader = TokenLoader(store, 50, seed=1, max_rows=100)
    rows = [set(np.concatenate([loader.batch(s).rows for s in part])) for part in ((0, 1), (2, 3))]
    assert rows[0] == rows[1] and len(rows[0]) == 100 and loader.rows == 100
    assert rows[0] != set(TokenLoader(store, 50, seed=2, max_rows=100).batch(0).rows)


@pytest.mark.parametrize("reading", [Reading(), WINDOW], ids=["full", "window"])
def test_a_filter_leaves_only_what_passes(store, reading):
    loader = TokenLoader(
        store, 16, 1, reading=reading, filter="class_id in [2, 3] and view is None"
    )
    passing = np.flatnonzero(np.isin(store.read_column("class_id"), [2, 3]))
    assert loader.rows == len(passing)
    rows = rows_of(loader, len(passing) // 16)
    assert set(rows) <= set(passing) and len(set(rows)) == len(rows)
    batch = loader.batch(1)
    np.testing.assert_array_equal(batch.codes.numpy(), store.read_codes(batch.rows))
    with pytest.raises(ValueError, match="none of its 300 rows"):
        TokenLoader(store, 16, filter="class_id > 99")


@pytest.fixture(scope="module", params=["arrow", "zarr"])
def viewed(request, tmp_path_factory):
    """40 images of 3 views each (two of the last), with a score."""
    path = make_store(tmp_path_factory.mktemp("views"), rows=0, backend=request.param)
    extra = pa.schema([("score", pa.float32())])
    with ShardWriter(path, "views", "v.tar", extra) as writer:
        keys = [f"image {n // 3}" for n in range(119)]
        writer.add(
            {
                "codes": np.repeat(np.arange(119)[:, None] % 60, 16, 1),
                "key": keys,
                "view": [n % 3 for n in range(119)],
                "score": [n / 119 for n in range(119)],
            }
        )
    return TokenStore(path)


@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_one_view_of_every_image_an_epoch(viewed, shuffle):
    loader = TokenLoader(viewed, 40, 1, reading=Reading(shuffle=shuffle, views="one"))
    assert loader.rows == 40
    epochs = [loader.batch(step) for step in range(30)]
    for batch in epochs:
        assert sorted(batch.rows // 3) == list(range(40))
        np.testing.assert_array_equal(batch.codes.numpy(), viewed.read_codes(batch.rows))
    views = np.array([sorted(batch.rows) for batch in epochs]) % 3
    counts = np.bincount(views[:, :39].reshape(-1), minlength=3)
    assert (abs(counts - 390) < 80).all()  # each a third of the time
    assert set(views[:, 39]) == {0, 1}


def test_views_and_a_filter(viewed):
    loader = TokenLoader(viewed, 10, 1, reading=Reading(views="one"), filter="score >= 0.5")
    assert loader.rows == 20 and set(rows_of(loader, 100)) == set(range(60, 119))


def test_a_mixture_keeps_its_shares_and_every_row(tmp_path):
    small = TokenStore(make_store(tmp_path / "small", rows=100, backend="zarr"))
    large = TokenStore(make_store(tmp_path / "large", rows=400))
    for weights, share in (((3.0, 1.0), 0.75), ((None, None), 0.2)):
        sources = [Source(s, w) for s, w in zip((small, large), weights, strict=True)]
        loader = TokenLoader(sources, 64, seed=5)
        batches = [loader.batch(step) for step in range(200)]
        which = np.concatenate([batch.sources for batch in batches])
        assert (which == 0).mean() == pytest.approx(share, abs=0.02)
        rows = np.concatenate([batch.rows for batch in batches])
        for number, store in enumerate((small, large)):
            first = rows[which == number][: len(store)]
            assert sorted(first) == list(range(len(store)))
        for batch in batches[:3]:
            for number, store in enumerate((small, large)):
                mine = batch.sources == number
                expected = store.read_codes(batch.rows[mine])
                np.testing.assert_array_equal(batch.codes.numpy()[mine], expected)
                classes = store.read_column("class_id")[batch.rows[mine]]
                np.testing.assert_array_equal(batch.class_ids.numpy()[mine], classes)
    ranks = [TokenLoader(sources, 64, 5, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([r.batch(7).codes for r in ranks]), loader.batch(7).codes)


def test_stores_of_other_codes_are_not_mixed(tmp_path, arrow):
    other = make_store(tmp_path / "other", classes=3)
    meta = TokenStore(other).meta
    meta.tokenizers["codes"].fingerprint = "f" * 64
    from storage.writer import create_store

    create_store(tmp_path / "third", meta)
    with pytest.raises(StoreMismatch, match="tokenizer"):
        TokenLoader([Source(arrow), Source(TokenStore(tmp_path / "third"))], 8)


def test_a_mixture_is_not_kept_on_a_gpu(arrow):
    with pytest.raises(ValueError, match="preload=ram"):
        TokenLoader([Source(arrow), Source(arrow)], 8, reading=Reading(preload="gpu"))


def test_zarr_without_preload_needs_windows(tmp_path):
    store = TokenStore(make_store(tmp_path, backend="zarr"))
    with pytest.raises(ValueError, match="muse-store convert"):
        TokenLoader(store, 8, reading=Reading(preload="none"))


@pytest.mark.parametrize("reading", [Reading(), WINDOW], ids=["full", "window"])
def test_damaged_codes_never_reach_a_batch(tmp_path, reading):
    for backend in ("arrow", "zarr"):
        path = make_store(tmp_path / backend, backend=backend)
        files = (p for p in path.rglob("00001/codes.*/**/*" if backend == "zarr" else "*.arrow"))
        data = max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 16
        data.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            rows_of(TokenLoader(TokenStore(path), 50, reading=reading), 6)


def test_a_sealed_store_reads_the_same(tmp_path):
    path = make_store(tmp_path)
    before = TokenLoader(TokenStore(path), 32, seed=1)
    seal(path)
    after = TokenLoader(TokenStore(path), 32, seed=1)
    after.load_state_dict(before.state_dict())
    assert torch.equal(before.batch(4).codes, after.batch(4).codes)


def test_too_large_for_memory_says_what_to_do():
    check_fits(10, 11, "s")
    check_fits(10, None, "s")
    with pytest.raises(MemoryError, match="shuffle=window"):
        check_fits(10**12, 10**9, "s")
    assert (available_memory() or 1) > 0


def test_limits_of_all_control_groups_count(tmp_path):
    (tmp_path / "cgroup").write_text("4:memory:/old\n0::/slurm/job_7/step_0\n")
    root = "/sys/fs/cgroup"
    folders = [str(folder) for folder in control_groups(tmp_path / "cgroup")]
    assert folders == [f"{root}/slurm/job_7/step_0", f"{root}/slurm/job_7", f"{root}/slurm", root]
    assert [str(folder) for folder in control_groups(tmp_path / "none")] == [root]


def test_compiled_and_plain_gather_agree():
    rng = np.random.default_rng(0)
    flat, index = rng.integers(0, 1000, 5000).astype(np.uint16), rng.integers(0, 4900, 64)
    a, b = np.zeros((64, 100), np.uint16), np.zeros((64, 100), np.uint16)
    copy_rows_numpy(flat, index, a)
    copy_rows(flat, index, b)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, flat[index[:, None] + np.arange(100)])
    assert gather(flat, index[:0], 0, (10, 10)).shape == (0, 10, 10)
