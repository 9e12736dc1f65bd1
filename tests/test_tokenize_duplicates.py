"""Duplicates: groups against brute force; scan, dedup and selection together, interrupted, too."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from tokenize_stage.process import Stopped
from tokenize_stage.selection import dedup, scan
from tokenize_stage.selection.config import FiltersConfig, ScanConfig
from tokenize_stage.selection.filters import Selection
from tokenize_stage.selection.near import (
    MAX_ONES,
    MIN_ONES,
    block_count,
    group_rows,
    keep_largest,
    near_pairs,
)
from tokenize_stage.sources.config import DatasetConfig


def brute_force(hashes: np.ndarray, phashes: np.ndarray, distance: int | None) -> np.ndarray:
    """group_rows by comparing all with all."""
    related = hashes[:, None] == hashes
    if distance is not None:
        ones = np.bitwise_count(phashes)
        is_sound = (ones >= MIN_ONES) & (ones <= MAX_ONES)
        near = np.bitwise_count(phashes[:, None] ^ phashes) <= distance
        related |= near & is_sound & is_sound[:, None]
    first = np.arange(len(hashes))
    while True:
        least = np.where(related, first, len(first)).min(1, initial=len(first))
        if np.array_equal(least, first):
            return first
        first = least


def near_hashes(base: Sequence[int], flips: Sequence[tuple[int, list[int]]]) -> np.ndarray:
    """Hashes that are some of `base` with some bits flipped."""
    found = [base[i % len(base)] ^ sum(1 << bit for bit in set(bits)) for i, bits in flips]
    return np.array(found, np.uint64)


BASE = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4)
FLIPS = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 63), max_size=6)))


@settings(deadline=None)
@given(BASE, FLIPS, st.integers(1, 4), st.sampled_from([None, *range(9)]))
def test_groups_equal_brute_force(
    base: list[int], flips: list[tuple[int, list[int]]], images: int, distance: int | None
) -> None:
    phashes = near_hashes(base, flips)
    rows = np.arange(len(phashes), dtype=np.uint64)
    hashes = np.where(rows % np.uint64(3) == 0, rows % np.uint64(images), rows)
    found = group_rows(hashes, phashes, distance)
    np.testing.assert_array_equal(found, brute_force(hashes, phashes, distance))


@pytest.mark.parametrize("distance", range(9))
def test_every_near_pair_of_many_is_found(distance: int) -> None:
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2**64, 300, np.uint64)
    flipped = [base]
    for bits in range(1, 10):
        masks = [sum(1 << int(b) for b in rng.choice(64, bits, False)) for _ in base]
        flipped.append(base ^ np.array(masks, np.uint64))
    values = np.unique(np.concatenate(flipped))
    pairs = {
        (int(a), int(b)) for x in near_pairs(values, distance) for a, b in zip(*x, strict=True)
    }
    differ = np.bitwise_count(values[:, None] ^ values)
    wanted = np.argwhere((differ <= distance) & (differ > 0)).tolist()
    assert {tuple(sorted(pair)) for pair in pairs} == {(a, b) for a, b in wanted if a < b}


def test_work_grows_slower_than_the_square() -> None:
    assert [block_count(rows, 4) for rows in (10**3, 10**6, 10**8)] == [5, 6, 7]


def test_largest_is_kept_and_the_first_of_equals() -> None:
    first = np.array([0, 1, 0, 1, 4, 0])
    areas = np.array([5, 9, 7, 9, 1, 7], np.int32)
    assert keep_largest(first, areas).tolist() == [2, 1, 2, 1, 4, 2]
    assert keep_largest(np.arange(0), areas[:0]).tolist() == []


def drawn(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (160, 120), tuple(rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, size = rng.integers(0, 120, 3)
        draw.ellipse((x, y, x + size, y + size), tuple(rng.integers(0, 256, 3)))
    return image


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    image.save(content := io.BytesIO(), "JPEG", quality=quality)
    return content.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a: 3 images, one opted out; b: an exact and a near copy; c: a larger copy, a broken one."""
    root = tmp_path_factory.mktemp("data")
    zero, one, two = map(drawn, range(3))
    opted_out = b'{"noai": true, "url": "http://example.com/2"}'
    write_tar(
        root / "in/a.tar",
        [
            ("0.jpg", encoded(zero)),
            ("1.jpg", encoded(one)),
            ("1.json", b'{"url": "http://example.com/1"}'),
            ("2.jpg", encoded(two)),
            ("2.json", opted_out),
        ],
    )
    write_tar(
        root / "in/b.tar",
        [("x/0.jpg", encoded(zero)), ("x/1.jpg", encoded(one, 40)), ("x/2.jpg", encoded(two))],
    )
    write_tar(
        root / "in/c.tar", [("0.jpg", encoded(zero.resize((320, 240)))), ("1.jpg", b"broken")]
    )
    return root


def run_scan(data: Path, out: Path, *options: str) -> int:
    return scan.main([f"dataset.shards_path_or_url={data}/in", f"out={out}", *options])


@pytest.fixture(scope="module")
def scans(data: Path) -> Path:
    assert run_scan(data, data / "scans", "threads=2") == 0
    return data / "scans"


def duplicates(scans: Path, out: Path, *options: str) -> list[tuple[str, ...]]:
    assert dedup.main([f"scans={scans}", f"out={out}", *options]) == 0
    names = ("shard", "key", "kind", "of_shard", "of_key")
    return [tuple(row[name] for name in names) for row in pq.read_table(out).to_pylist()]


def test_scan_has_what_passes_and_decodes(scans: Path) -> None:
    tables = {path.stem: pq.read_table(path).to_pylist() for path in scans.glob("*.parquet")}
    keys = {name: [row["key"] for row in rows] for name, rows in tables.items()}
    assert keys == {"a": ["0", "1"], "b": ["x/0", "x/1", "x/2"], "c": ["0"]}
    assert pq.read_schema(scans / "a.parquet").metadata[b"skipped"] == b'{"filtered noai": 1}'
    assert pq.read_schema(scans / "c.parquet").metadata[b"skipped"] == b'{"bad image": 1}'
    row = tables["a"][1]
    assert (row["url"], row["width"], row["height"]) == ("http://example.com/1", 160, 120)
    assert row["phash"] is not None and len(row["image_hash"]) == 32


def test_first_or_largest_is_kept(scans: Path, tmp_path: Path) -> None:
    zero = ("b", "x/0", "exact", "a", "0")
    one = ("b", "x/1", "near", "a", "1")
    first = duplicates(scans, tmp_path / "first.parquet")
    assert first == [zero, one, ("c", "0", "near", "a", "0")]
    # "x/2" repeats an image that opted out: it is no duplicate of what will not be encoded
    largest = duplicates(scans, tmp_path / "largest.parquet", "keep=largest")
    assert largest == [("a", "0", "near", "c", "0"), ("b", "x/0", "near", "c", "0"), one]
    assert duplicates(scans, tmp_path / "exact.parquet", "distance=null") == [zero]


def test_the_selection_of_each_task_drops_its_own(scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "duplicates.parquet"
    duplicates(scans, out)
    selection = Selection(FiltersConfig(duplicates=str(out)))
    found = {name: {key for key, _ in selection.for_shard(name).duplicates} for name in "abc"}
    assert found == {"a": set(), "b": {"x/0", "x/1"}, "c": {"0"}}


def test_tasks_share_the_shards_and_a_second_run_does_nothing(
    data: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in range(2):
        assert run_scan(data, tmp_path, f"task={task}", "tasks=2") == 0
    for path in scans.glob("*.parquet"):
        assert pq.read_table(path).equals(pq.read_table(tmp_path / path.name))
    capsys.readouterr()
    assert run_scan(data, tmp_path) == 0
    assert "3 of 3 shards, 0 to do" in capsys.readouterr().out


def test_dedup_refuses_missing_scans_unless_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "duplicates.parquet"
    assert dedup.main([f"scans={tmp_path}", f"out={out}"]) == 2
    assert "muse-tokenize scan makes them" in capsys.readouterr().err
    assert run_scan(data, tmp_path, "task=1", "tasks=2", "phash=none") == 0
    assert dedup.main([f"scans={tmp_path}", f"out={out}"]) == 2
    assert "lacks the scans of 2 shards, a first" in capsys.readouterr().err
    assert duplicates(tmp_path, out, "partial=true") == []


def test_another_input_of_the_same_name_is_refused(
    data: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "in/a.tar", [("0.jpg", encoded(drawn(7)))])
    assert run_scan(tmp_path, scans) == 2
    assert "a.parquet is the scan of" in capsys.readouterr().err


def test_hashes_that_the_metadata_has_serve_when_asked(tmp_path: Path) -> None:
    phashes = ["00ff00ff00ff00ff", "00ff00ff00ff00fe", "ff00ff00ff00ff00"]
    members = []
    for number, phash in enumerate(phashes):
        about = f'{{"image_phash": "{phash}", "width": 9, "height": 8}}'.encode()
        members += [(f"{number}.jpg", b"not decoded %d" % number), (f"{number}.json", about)]
    write_tar(tmp_path / "in/a.tar", members)
    assert run_scan(tmp_path, tmp_path / "scans", "phash=metadata") == 0
    found = duplicates(tmp_path / "scans", tmp_path / "duplicates.parquet")
    assert found == [("a", "1", "near", "a", "0")]


def test_a_stop_leaves_no_half_scan(data: Path, tmp_path: Path) -> None:
    dataset = DatasetConfig(shards_path_or_url=f"{data}/in/a.tar")
    work = scan.plan(ScanConfig(dataset, out=str(tmp_path)))
    (stop := Event()).set()
    with pytest.raises(Stopped):
        scan.scan_shard(work, work.todo[0], stop, lambda count: None)
    assert not list(tmp_path.glob("*.parquet"))


def test_an_input_that_cannot_be_read_is_reported_and_the_others_are_scanned(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = f"{data}/in/c.tar::pipe:false gone.tar"
    options = [f"dataset.shards_path_or_url={places}", "dataset.read_attempts=1"]
    assert scan.main([*options, f"out={tmp_path}"]) == 3
    errors = capsys.readouterr().err
    assert "failed: gone: " in errors and "1 shards could not be read" in errors
    assert [path.stem for path in tmp_path.glob("*.parquet")] == ["c"]
