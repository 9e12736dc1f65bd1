"""Damage to a store is found by verify and refused by readers, each kind in its own words."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from filled_store import fill_store
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.atomic import read_json, write_json
from storage.reader import TokenStore
from storage.rewrite import compact_store
from storage.seal import seal
from storage.tombstones import drop
from storage.verify import verify_store

VERSION_1 = Path(__file__).parent / "data" / "store_version_1"  # by the code of commit 662e83a


@pytest.fixture(params=["zarr", "arrow"])
def backend(request):
    return request.param


def every_kind_of_file(path, backend):
    """A sealed store with a rewritten shard, a superseded one, tombstones and rejected samples."""
    fill_store(path, backend, counts=(80, 0, 50))
    drop(path, "key", ["0-0003"])
    shutil.copytree(path / "shards" / "00000", path / "before")
    compact_store(path)
    shutil.move(path / "before", path / "shards" / "00000")
    drop(path, "key", ["0-0007", "2-0001"])
    seal(path)
    return path


@pytest.fixture(scope="module", params=["zarr", "arrow"])
def shared(tmp_path_factory, request):
    return every_kind_of_file(tmp_path_factory.mktemp("shared") / "store", request.param)


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def everything(path):
    """All that a reader hands out."""
    store = TokenStore(path)
    codes = store.read_codes(slice(None))
    return codes.tobytes(), store.table(), store.skipped(), store.shards, store.missing_shards()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_flipped_bit_is_found(shared, seed):
    """By verify, which names the file; readers refuse it, or it does not concern them."""
    rng, whole, refused = np.random.default_rng(seed), everything(shared), Counter()
    assert verify_store(shared) == []
    for file in files_of(shared):
        before = file.read_bytes()
        place, bit = int(rng.integers(len(before))), 1 << int(rng.integers(8))
        file.write_bytes(before[:place] + bytes([before[place] ^ bit]) + before[place + 1 :])
        try:
            assert any(str(file) in problem for problem in verify_store(shared)), (file, place, bit)
            assert everything(shared) == whole, (file, place, bit)
        except (ValueError, OSError):
            refused[file.name] += 1
        finally:
            file.write_bytes(before)
    assert {"store.json", "sealed.json", "manifest.json", "rows.parquet"} <= set(refused)


def shard(path, name):
    return path / "shards" / name


def codes_file(folder):
    arrow = folder / "codes.arrow"
    return arrow if arrow.exists() else folder / "codes.zarr" / "c" / "0" / "0"


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def exchange(one, other):
    other.rename(one.with_name("between"))
    one.rename(other)
    one.with_name("between").rename(one)


def foreign(path):
    meta = json.loads((path / "store.json").read_bytes())
    other = fill_store(path.with_name("other"), meta["backend"], transform={"resize": "box"})
    shutil.rmtree(shard(path, "00001"))
    shutil.move(shard(other, "00001"), shard(path, "00001"))


DAMAGE = {
    "no codes": (
        lambda path: codes_file(shard(path, "00000")).unlink(),
        "00000/codes.* is missing: delete this shard folder",
        "00000/codes.*restore it, or delete its shard folder",
    ),
    "no table": (
        lambda path: (shard(path, "00002") / "rows.parquet").unlink(),
        "00002/rows.parquet is missing: delete this shard folder",
        "00002/rows.parquet is missing: restore it",
    ),
    "no rejected samples": (
        lambda path: (shard(path, "00002") / "skipped.parquet").unlink(),
        "00002/skipped.parquet is missing: delete this shard folder",
        "00002/skipped.parquet is missing: restore it",
    ),
    "no manifest": (
        lambda path: (shard(path, "00001") / "manifest.json").unlink(),
        "00001/manifest.json is missing: delete this shard folder",
        "00001/manifest.json is (missing: restore it|gone)",
    ),
    "no shard": (
        lambda path: shutil.rmtree(shard(path, "00001")),
        "shards/00001 is missing: run muse-tokenize again",
        "shards/00001 was sealed and is missing .* restore it",
    ),
    "truncated codes": (
        lambda path: cut(codes_file(shard(path, "00000"))),
        "00000/codes.* is damaged: it has .* bytes: delete this shard folder",
        "00000/codes.*restore it, or delete its shard folder",
    ),
    "truncated table": (
        lambda path: cut(shard(path, "00000") / "rows.parquet"),
        "00000/rows.parquet is damaged: it has .* bytes: delete this shard folder",
        "00000/rows.parquet is truncated.*restore it",
    ),
    "truncated manifest": (
        lambda path: cut(shard(path, "00000") / "manifest.json"),
        "00000/manifest.json is damaged.*restore it",
        "00000/manifest.json is (damaged.*restore it|not the one that was sealed)",
    ),
    "exchanged shards": (
        lambda path: exchange(shard(path, "00000"), shard(path, "00002")),
        "00000 holds shard 00002: rename it back",
        "00000.*(holds shard 00002: rename it back|is not the one that was sealed)",
    ),
    "exchanged codes": (
        lambda path: exchange(codes_file(shard(path, "00000")), codes_file(shard(path, "00002"))),
        "00002/codes.* is damaged: .* delete this shard folder",
        "00000/codes.*restore it, or delete its shard folder",
    ),
    "exchanged tables": (
        lambda path: exchange(
            shard(path, "00000") / "rows.parquet", shard(path, "00002") / "rows.parquet"
        ),
        "00000/rows.parquet is damaged: .* delete this shard folder",
        "00000/rows.parquet is (damaged|truncated).*restore it",
    ),
    "a foreign shard": (
        foreign,
        "00001 was made for another store: move it",
        "00001.*(was made for another store: move it|is not the one that was sealed)",
    ),
    "a stray file": (
        lambda path: (path / "shards" / "notes.txt").write_text("x"),
        "notes.txt",
        "notes.txt/manifest.json is missing",
    ),
}


@pytest.mark.parametrize("is_sealed", [False, True])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path, backend, kind, is_sealed):
    damage, found, refused = DAMAGE[kind]
    path = fill_store(tmp_path / "store", backend, counts=(80, 20, 80))
    if is_sealed:
        seal(path)
    damage(path)
    problems = "\n".join(verify_store(path))
    assert re.search(found, problems), problems
    if kind == "no shard" and not is_sealed:
        assert TokenStore(path).missing_shards() == ["00001"]
        return
    with pytest.raises((ValueError, FileNotFoundError), match=refused):
        everything(path)


def test_a_sealed_shard_that_is_gone_is_refused_until_sealed_anew(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend)
    seal(path)
    shutil.rmtree(shard(path, "00002"))
    with pytest.raises(ValueError, match="00002 was sealed and is missing .* muse-store seal"):
        TokenStore(path)
    seal(path)
    assert TokenStore(path).shards == ["00000", "00001"]


def test_a_tombstone_that_is_gone_is_refused_until_sealed_anew(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend)
    seal(path)
    drop(path, "key", ["0-0003"])
    (tombstone,) = path.glob("tombstones/*.json")
    tombstone.unlink()
    assert f"{tombstone} is missing" in verify_store(path)[0]
    with pytest.raises(ValueError, match=f"{tombstone} is missing .* muse-store seal"):
        TokenStore(path)
    seal(path)
    assert len(TokenStore(path)) == 130 and verify_store(path) == []


def test_a_lost_index_is_no_loss(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend)
    seal(path)
    (index,) = path.glob("index-*.parquet")
    content = index.read_bytes()
    index.unlink()
    assert len(TokenStore(path)) == 130
    assert f"{index} is missing: run muse-store seal again" in verify_store(path)[0]
    seal(path)
    assert index.read_bytes() == content and verify_store(path) == []
    index.write_bytes(content[:50] + b"x" + content[51:])
    seal(path)
    assert index.read_bytes() == content


def test_a_shard_that_was_made_anew_is_looked_through_anew(tmp_path, backend):
    """The tombstone's row numbers were those of the shard that is no more."""
    path = fill_store(tmp_path / "store", backend)
    drop(path, "key", ["0-0003"])
    kept = TokenStore(path).table(["key"]).to_pylist()
    shutil.rmtree(shard(path, "00000"))
    other = fill_store(tmp_path / "other", backend, counts=(86, 0, 50))
    shutil.move(shard(other, "00000"), shard(path, "00000"))
    again = TokenStore(path).table(["key"]).to_pylist()
    assert {"key": "0-0003"} not in again
    assert [row for row in again if row not in kept] == [
        {"key": f"0-00{row // 2}"} for row in range(80, 86)
    ]


# Schema versions.


@pytest.fixture
def version_1(tmp_path, backend):
    """Six rows and a rejected sample, written by version 1."""
    return Path(shutil.copytree(VERSION_1 / backend, tmp_path / "store"))


def test_version_1_opens(version_1):
    store = TokenStore(version_1)
    codes = np.arange(24).reshape(6, 4) * 37 % 1024
    np.testing.assert_array_equal(store.read_codes(slice(None)), codes)
    assert store.read_column("class_id").tolist() == [0, 1, 2, 0, 1, 2]
    assert store.table(["caption"])["caption"].to_pylist() == [None, "ünï"] * 3
    assert store.skipped().to_pylist() == [
        {"key": "bad", "source": "00001.tar", "reason": "not an image: no header"}
    ]
    assert len(store.to_arrow()) == 6 and store.missing_shards() == []
    assert verify_store(version_1) == []


def test_version_1_seals_drops_and_compacts(version_1):
    fingerprint = TokenStore(version_1).content_fingerprint()
    seal(version_1)
    assert TokenStore(version_1).content_fingerprint() == fingerprint
    assert read_json(version_1 / "store.json")["schema_version"] == 1
    drop(version_1, "key", ["0-2"])
    assert read_json(version_1 / "store.json")["schema_version"] == 2  # old readers refuse it
    codes = np.delete(np.arange(24).reshape(6, 4) * 37 % 1024, 2, axis=0)
    for _ in range(2):
        store = TokenStore(version_1)
        np.testing.assert_array_equal(store.read_codes(slice(None)), codes)
        assert store.table(["key"])["key"].to_pylist() == ["0-0", "0-1", "0-3", "0-4", "0-5"]
        assert verify_store(version_1) == []
        compact_store(version_1)
    assert store.index.folders == ["00000@v2", "00001"]


def test_damage_to_version_1_is_refused(version_1):
    whole = everything(version_1)
    rng = np.random.default_rng(0)
    for file in 3 * files_of(version_1):
        before = file.read_bytes()
        place, bit = int(rng.integers(len(before))), 1 << int(rng.integers(8))
        file.write_bytes(before[:place] + bytes([before[place] ^ bit]) + before[place + 1 :])
        assert verify_store(version_1)
        try:
            assert everything(version_1) == whole, (file, place, bit)
        except (ValueError, OSError):
            pass
        file.write_bytes(before)


def test_a_newer_version_says_so(version_1):
    meta = read_json(version_1 / "store.json")
    write_json(version_1 / "store.json", meta | {"schema_version": 3, "new": 1})
    with pytest.raises(ValueError, match="store is of schema version 3.* up to 2: update"):
        TokenStore(version_1)
