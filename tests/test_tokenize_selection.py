"""The selection: every filter's reason, what is unknown, rights, duplicates, many threads."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.load import ConfigError, load_config
from tokenize_stage.pixels.config import PreprocessingConfig
from tokenize_stage.pixels.decode import Picture
from tokenize_stage.pixels.views import Decoder
from tokenize_stage.selection.config import DedupConfig, FiltersConfig, ScanConfig
from tokenize_stage.selection.duplicates import SCHEMA, write_duplicates
from tokenize_stage.selection.filters import Selection
from tokenize_stage.sources.sample import Sample

GOOD = {"original_width": 600, "original_height": 512, "pwatermark": 0.1, "aesthetic": 6.0}
HASH = sha256(b"").hexdigest()


def sample(caption: str | None = None, key: str = "key", **metadata: Any) -> Sample:
    return Sample(key, b"", None, caption, "source", metadata)


def reason(filters: FiltersConfig, given: Sample) -> str | None:
    return Selection(filters).for_shard("shard").check(given, HASH)


def picture(width: int, height: int, phash: bool = False) -> Picture:
    image = Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 50)
    image.save(content := io.BytesIO(), "PNG")
    decoder = Decoder(PreprocessingConfig(resolution=32), [32], phash=phash)
    return decoder.decode(content.getvalue(), HASH)[0]


@pytest.mark.parametrize(
    ("options", "about", "expected"),
    [
        ({"min_size": 513}, {}, "filtered size: 600x512, filters.min_size=513"),
        ({"min_size": 512}, {}, None),
        ({"max_aspect": 1.1}, {}, "filtered aspect: 600x512, filters.max_aspect=1.1"),
        ({"max_aspect": 1.2}, {}, None),
        (
            {"min_aesthetic_score": 5},
            {"AESTHETIC_SCORE": "4.5"},
            "filtered aesthetic: 4.5, filters.min_aesthetic_score=5",
        ),
        (
            {"max_watermark": 0.5},
            {"watermark_score": 0.51},
            "filtered watermark: 0.51, filters.max_watermark=0.5",
        ),
        ({"max_nsfw": 0.45}, {"NSFW": "UNSURE"}, "filtered nsfw: 0.5, filters.max_nsfw=0.45"),
        ({"max_nsfw": 0.45}, {"nsfw_score_gantman": 0.4}, None),
        ({"max_nsfw": 0.45}, {}, None),  # nobody says
        (
            {"require_metadata": ["nsfw"]},
            {},
            "filtered metadata: no nsfw, filters.require_metadata",
        ),
        ({"require_metadata": ["getty"]}, {"is_getty": True}, None),
        ({"drop_getty": True}, {"is_getty": 1}, "filtered getty"),
        ({}, {"is_getty": True}, None),
        ({}, {"is_spawning": True}, "filtered spawning"),
        ({"drop_spawning": False}, {"is_spawning": True}, None),
        ({}, {"noimageai": True}, "filtered noai"),
        ({"respect_noai": False}, {"noimageai": True}, None),
    ],
)
def test_reasons(options: dict[str, Any], about: dict[str, Any], expected: str | None) -> None:
    found = reason(FiltersConfig(**options), sample(**(GOOD | about)))
    assert found == expected if expected is None or ", " in expected else found.startswith(expected)


def test_the_documented_options_filter_as_the_reference_does() -> None:
    words = [word.strip(".") for word in (FiltersConfig.__doc__ or "").split() if "=" in word]
    filters = load_config(FiltersConfig, words)
    recorded = json.loads((Path(__file__).parent / "parity/data/case.json").read_text())["calls"]
    calls = [call for call in recorded if call["id"].startswith("select_1_")]
    assert [calls[0]["kwargs"]["min_aesthetic_score"], len(calls)] == [4.75, 17]
    for call in calls:
        is_selected = reason(filters, sample(**call["args"][0])) is None
        assert is_selected == call["returns"]["value"], call["id"]


def test_captions() -> None:
    filters = FiltersConfig(min_caption_words=2, max_caption_chars=10, merge_person_tokens=True)
    assert reason(filters, sample("two words")) is None
    short = "filtered caption: 0 words, filters.min_caption_words=2"
    assert reason(filters, sample(None)) == short
    long = "filtered caption: 11 characters, filters.max_caption_chars=10"
    assert reason(filters, sample("eleven char")) == long
    assert Selection(filters).caption("<person> and <person>") == " people "
    assert Selection(filters).caption(None) is None
    assert Selection(FiltersConfig()).caption("<person>, <person>") == "<person>, <person>"


def test_the_real_size_counts_only_where_metadata_has_none() -> None:
    of_shard = Selection(FiltersConfig(min_size=50, max_aspect=2)).for_shard("shard")
    small, long = picture(64, 40), picture(150, 60)
    assert of_shard.check_picture(sample(**GOOD), small) is None  # resized since
    expected = "filtered size: 64x40, filters.min_size=50"
    assert of_shard.check_picture(sample(original_width=600), small) == expected
    expected = "filtered aspect: 150x60, filters.max_aspect=2"
    assert of_shard.check_picture(sample(), long) == expected
    assert of_shard.check_picture(sample(), picture(60, 60)) is None


def test_deny_lists(tmp_path: Path) -> None:
    seen = picture(64, 64, phash=True)
    lists = {
        "urls": "https://example.com/a.jpg",
        "domains": "example.org",
        "hashes": f"{sha256(b'denied').hexdigest()}\n{'ab' * 16}\n{seen.phash}",
    }
    options = {}
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
        options[f"deny_{name}"] = [str(tmp_path / name)]
    of_shard = Selection(FiltersConfig(phash=True, **options)).for_shard("shard")
    url = "denied url: http://example.com/a.jpg#b, filters.deny_urls"
    assert of_shard.check(sample(url="http://example.com/a.jpg#b"), HASH) == url
    domain = "denied domain: http://x.example.org/, filters.deny_domains"
    assert of_shard.check(sample(URL="http://x.example.org/"), HASH) == domain
    assert of_shard.check(sample(url="http://example.com/b.jpg"), HASH) is None
    denied = sha256(b"denied").hexdigest()
    for digest, about in ((denied, {}), (HASH, {"sha256": denied}), (HASH, {"md5": "AB" * 16})):
        assert str(of_shard.check(sample(**about), digest)).startswith("denied hash: ")
    by_phash = f"denied hash: {seen.phash}, filters.deny_hashes"
    assert of_shard.check(sample(image_phash=seen.phash), HASH) == by_phash
    assert of_shard.check_picture(sample(), seen) == by_phash


def test_columns_are_the_worst_scores_and_the_first_aesthetic_one() -> None:
    about = {"punsafe": 0.2, "nsfw_score_gantman": "0.7", "AESTHETIC_SCORE": 9, "url": "u"}
    selection = Selection(FiltersConfig(phash=True))
    seen = picture(64, 64, phash=True)
    row = selection.for_shard("shard").columns(sample(aesthetic=1.5, **about), HASH, seen)
    assert row == {
        "url": "u",
        "aesthetic_score": 1.5,
        "watermark_score": None,
        "nsfw_score": 0.7,
        "phash": seen.phash,
    }
    assert pa.Table.from_pylist([row], schema=selection.fields).num_rows == 1
    assert len(seen.phash or "") == 16


def duplicates_file(path: Path, rows: int = 1) -> str:
    columns = {name: ["x"] * rows for name in SCHEMA.names}
    columns |= {"shard": ["shard"] * rows, "key": [f"key{i}" for i in range(rows)]}
    columns |= {"image_hash": [HASH[:16]] * rows, "kind": ["near"] * rows}
    columns |= {"of_shard": ["first"] * rows, "of_key": ["a/b"] * rows}
    write_duplicates(path, pa.table(columns, schema=SCHEMA), ["first", "shard"])
    return str(path)


def test_duplicates_are_dropped_or_marked(tmp_path: Path) -> None:
    path = duplicates_file(tmp_path / "duplicates.parquet")
    drop = Selection(FiltersConfig(duplicates=path))
    found = drop.for_shard("shard").check(sample(key="key0"), HASH)
    assert found == "duplicate near: of a/b in shard first"
    assert drop.for_shard("shard").check(sample(key="key0"), "0" * 64) is None  # other bytes now
    assert drop.for_shard("first").check(sample(key="key0"), HASH) is None
    mark = Selection(FiltersConfig(duplicates=path, on_duplicate="mark"))
    of_shard = mark.for_shard("shard")
    assert of_shard.check(sample(key="key0"), HASH) is None
    row = of_shard.columns(sample(key="key0"), HASH, picture(64, 64))
    assert row["duplicate_of"] == "first/a/b"
    assert of_shard.columns(sample(key="key1"), HASH, picture(64, 64))["duplicate_of"] is None
    assert "duplicate_of" not in drop.fields.names


def test_files_of_duplicates_that_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="muse-tokenize scan, then muse-tokenize dedup"):
        Selection(FiltersConfig(duplicates=str(tmp_path / "none.parquet")))
    path = duplicates_file(tmp_path / "duplicates.parquet")
    with pytest.raises(ValueError, match="1 shards were not scanned, other first"):
        Selection(FiltersConfig(duplicates=path)).refuse_unscanned(["shard", "other", "first"])
    pq.write_table(pa.table({"shard": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="other.parquet was not written by muse-tokenize dedup"):
        Selection(FiltersConfig(duplicates=str(tmp_path / "other.parquet")))


def test_each_shard_reads_its_own_rows_of_many(tmp_path: Path) -> None:
    counts = {"a": 40_000, "b": 1, "c": 70_000, "d": 0}  # row groups end within a and c
    shards = [name for name, count in counts.items() for _ in range(count)]
    keys = [str(row) for row in range(len(shards))]
    columns = {name: keys for name in SCHEMA.names} | {"shard": shards}
    path = tmp_path / "duplicates.parquet"
    write_duplicates(path, pa.table(columns, schema=SCHEMA), list(counts))
    selection = Selection(FiltersConfig(duplicates=str(path)))
    found = {name: selection.for_shard(name).duplicates for name in counts}
    assert {name: len(rows) for name, rows in found.items()} == counts
    assert set(found["b"]) == {("40000", "40000")}


def test_many_threads_share_a_selection(tmp_path: Path) -> None:
    (tmp_path / "urls").write_text("\n".join(f"http://e.org/{i}" for i in range(0, 1000, 2)))
    duplicates = duplicates_file(tmp_path / "duplicates.parquet", 1000)
    filters = FiltersConfig(deny_urls=[str(tmp_path / "urls")], duplicates=duplicates, max_nsfw=0.5)
    selection = Selection(filters)
    given = [sample(key=f"key{3 * i}", url=f"https://e.org/{i}") for i in range(1000)]
    of_shards = [selection.for_shard("shard")] * len(given)
    alone = [of.check(one, HASH) for of, one in zip(of_shards, given, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = pool.map(
                lambda one: selection.for_shard("shard").check(one, HASH), given[:40]
            )
            assert list(together) == alone[:40]
            assert list(pool.map(of_shards[0].check, given, [HASH] * 1000)) == alone
    assert [str(found).split(":")[0] for found in alone[332:336]] == [
        "denied url",
        "duplicate near",
        "denied url",
        "None",
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("min_size=-1", "filters.min_size=-1: it must be in 0..inf"),
        ("max_aspect=0.5", "filters.max_aspect=0.5: it must be in 1..inf"),
        ("max_watermark=nan", "filters.max_watermark=nan: it must be in 0..1"),
        ("max_nsfw=1.5", "filters.max_nsfw=1.5: it must be in 0..1"),
        ("require_metadata=[size,colour]", r"filters.require_metadata=\['colour'\]: legal are"),
    ],
)
def test_options_are_checked(option: str, message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        load_config(FiltersConfig, [option])


@pytest.mark.parametrize(
    ("schema", "option", "message"),
    [
        (DedupConfig, "distance=9", "distance=9: it must be in 0..8, or None"),
        (ScanConfig, "threads=0", "threads=0: it must be at least 1"),
    ],
)
def test_options_of_the_commands_are_checked(schema: type, option: str, message: str) -> None:
    given = ["scans=a", "out=b"] if schema is DedupConfig else ["out=a"]
    given += [] if schema is DedupConfig else ["dataset.shards_path_or_url=b"]
    with pytest.raises((ConfigError, ValueError), match=message):
        load_config(schema, [*given, option])
