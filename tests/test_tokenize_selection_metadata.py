"""What metadata says: all spellings, and values that are none."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenize_stage.selection import metadata as said
from tokenize_stage.selection.captions import merge_person_tokens

COYO = {  # as img2dataset writes a sample of COYO-700M
    "url": "https://example.com/a.jpg",
    "width": 256,  # after the resize
    "height": 192,
    "original_width": 1024,
    "original_height": 768,
    "sha256": "C" * 64,
    "image_phash": "9F91e133b1924e4e",
    "nsfw_score_opennsfw2": 0.0058,
    "nsfw_score_gantman": 0.25,
    "watermark_score": 0.11,
    "aesthetic_score_laion_v2": 4.87,
}
LAION = {
    "URL": "https://example.com/b.jpg",
    "WIDTH": 1900.0,
    "HEIGHT": 1266.0,
    "hash": 6295651997640470000,
    "punsafe": 0.013,
    "pwatermark": 0.154,
    "AESTHETIC_SCORE": 5.14,
}


def test_coyo() -> None:
    assert said.original_size(COYO) == (1024, 768)
    assert said.watermark_scores(COYO) == [0.11]
    assert said.aesthetic_scores(COYO) == [4.87]
    assert said.nsfw_scores(COYO) == [0.0058, 0.25]
    assert said.url_of(COYO) == "https://example.com/a.jpg"
    assert said.digests(COYO) == ["c" * 64]
    assert said.phash_of(COYO) == "9f91e133b1924e4e"
    assert said.is_getty(COYO) is None and not said.is_noai(COYO)


def test_laion() -> None:
    assert said.original_size(LAION) == (1900, 1266)
    assert said.watermark_scores(LAION) == [0.154]
    assert said.aesthetic_scores(LAION) == [5.14]
    assert said.nsfw_scores(LAION) == [0.013]
    assert said.url_of(LAION) == "https://example.com/b.jpg"
    assert said.digests(LAION) == []  # LAION's integer `hash` is none of the image


def test_stability_metadata() -> None:
    inner = {"p_watermarkdf": 0.1, "aes_scorelv2": 5.5, "p_nsfwdf": 0.2}
    about = {"stability_metadata": {**inner, "is_getty": False, "is_spawning": True}}
    assert said.watermark_scores(about) == [0.1]
    assert said.aesthetic_scores(about) == [5.5]
    assert said.nsfw_scores(about) == [0.2]
    assert (said.is_getty(about), said.is_spawning(about)) == (False, True)
    for nothing in (None, [], "text", 3):
        assert said.watermark_scores({"stability_metadata": nothing}) == []


@pytest.mark.parametrize(
    ("word", "scores"),
    [("UNLIKELY", [0.0]), (" unsure", [0.5]), ("NSFW", [1.0]), ("0.3", [0.3]), ("?", [])],
)
def test_nsfw_in_words(word: str, scores: list[float]) -> None:
    assert said.nsfw_scores({"NSFW": word}) == scores


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), ("0.5", 0.5), (" 2e-1 ", 0.2), (10**400, None), ("1_", None), (True, None)]
    + [(x, None) for x in (None, math.nan, "nan", math.inf, "-inf", [], {}, "", b"1")],
)
def test_numbers(value: Any, number: float | None) -> None:
    assert said.watermark_scores({"pwatermark": value}) == ([] if number is None else [number])


@pytest.mark.parametrize(
    ("about", "size"),
    [
        ({"original_width": "640", "original_height": 480.9}, (640, 480)),
        ({"original_width": 0, "original_height": -3, "WIDTH": 5, "HEIGHT": 6}, (5, 6)),
        ({"original_width": 640}, (640, None)),
        ({"original_width": 2**31, "original_height": math.nan}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_sizes(about: dict[str, Any], size: tuple[int | None, int | None]) -> None:
    assert said.original_size(about) == size


@pytest.mark.parametrize("yes", [True, 1, 1.0, "true", "1", "Yes"])
@pytest.mark.parametrize("no", [False, 0, 0.0, "False", "0", "no"])
@pytest.mark.parametrize("unknown", [None, math.nan, "maybe", [], 2])
def test_flags(yes: Any, no: Any, unknown: Any) -> None:
    assert said.is_getty({"is_getty": yes, "stability_metadata": {"is_getty": no}}) is True
    assert said.is_getty({"is_getty": no, "stability_metadata": {"is_getty": unknown}}) is False
    assert said.is_getty({"is_getty": unknown}) is None


@pytest.mark.parametrize(
    ("about", "is_noai"),
    [
        ({"noai": True}, True),
        ({"noimageai": "1"}, True),
        ({"noai": False}, False),
        ({"X-Robots-Tag": "noindex, NoAI"}, True),
        ({"x_robots_tag": ["noarchive", "otherbot: noimageai"]}, True),
        ({"robots": "noindex, nofollow"}, False),
        ({"robots": None}, False),
    ],
)
def test_noai(about: dict[str, Any], is_noai: bool) -> None:
    assert said.is_noai(about) is is_noai


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
NAMES = [*said.WATERMARK, *said.AESTHETIC, *said.NSFW, *said.URL, *said.DIGESTS, *said.PHASH]
NAMES += [*said.GETTY, *said.NOAI, *said.ROBOTS, *sum(said.SIZES, ()), "stability_metadata"]


@given(st.dictionaries(st.sampled_from(NAMES), JSON))
def test_whatever_json_holds_it_is_read(about: dict[str, Any]) -> None:
    scores = [*said.watermark_scores(about), *said.aesthetic_scores(about)]
    assert all(math.isfinite(score) for score in scores + said.nsfw_scores(about))
    assert all(side is None or 1 <= side < 2**31 for side in said.original_size(about))
    assert all(len(digest) in (32, 64) for digest in said.digests(about))
    assert isinstance(said.is_noai(about), bool)
    (said.url_of(about) or "").encode()  # it can be stored
    assert said.phash_of(about) is None or int(said.phash_of(about) or "", 16) < 2**64


def test_a_url_that_no_table_could_store() -> None:
    assert said.url_of({"url": "", "URL": "http://\ud800/"}) == "http://?/"


def test_person_tokens_of_long_captions_take_linear_time() -> None:
    assert merge_person_tokens("<person>,  and <person><person>") == " people "
    assert merge_person_tokens("a <person> band") == "a <person> band"
    hostile = "<person>" + " ," * 300_000
    assert merge_person_tokens(hostile) == hostile  # quadratic time would be minutes
