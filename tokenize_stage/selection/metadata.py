"""What the metadata of a sample says, under every name that the large data sets give it.

    size       original_width/original_height of img2dataset and DataComp, WIDTH/HEIGHT of LAION,
               width/height of COYO and PD12M (of img2dataset: after its resize, so they come last)
    watermark  pwatermark (LAION), watermark_score (COYO), stability_metadata.p_watermarkdf
    aesthetic  aesthetic, AESTHETIC_SCORE (LAION-aesthetics 1 and 2), aesthetic_score_laion_v2
               (COYO), stability_metadata.aes_scorelv2, aesthetic_score
    NSFW       punsafe (LAION), nsfw_score_opennsfw2 and nsfw_score_gantman (COYO),
               stability_metadata.p_nsfwdf; NSFW (LAION-400M): UNLIKELY is 0, UNSURE 0.5, NSFW 1
    hashes     sha256, md5 (img2dataset, DataComp), hash (PD12M: md5; LAION's integer is no hash of
               the image and is left out), image_phash (COYO), phash

All of it comes from strangers. A number may be written as text; what is null, NaN, infinite, a
boolean or of another type is no number, a side below 1 or above 2^31 no size: as if not there.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Metadata = Mapping[str, Any]

SIZES = (("original_width", "original_height"), ("WIDTH", "HEIGHT"), ("width", "height"))
WATERMARK = ("pwatermark", "watermark_score", "stability_metadata.p_watermarkdf")
AESTHETIC = (
    "aesthetic",
    "AESTHETIC_SCORE",
    "aesthetic_score_laion_v2",
    "stability_metadata.aes_scorelv2",
    "aesthetic_score",
)
NSFW = (
    "punsafe",
    "nsfw_score_opennsfw2",
    "nsfw_score_gantman",
    "stability_metadata.p_nsfwdf",
    "nsfw_score",
    "NSFW",
    "nsfw",
)
NSFW_WORDS = {"UNLIKELY": 0.0, "UNSURE": 0.5, "NSFW": 1.0}
GETTY = ("stability_metadata.is_getty", "is_getty")
SPAWNING = ("stability_metadata.is_spawning", "is_spawning")  # opted out with Spawning
NOAI = ("noai", "noimageai")
ROBOTS = ("X-Robots-Tag", "x-robots-tag", "x_robots_tag", "robots")  # "noai, noimageai, noindex"
URL = ("url", "URL", "image_url")
DIGESTS = ("sha256", "md5", "hash")
PHASH = ("image_phash", "phash")
TRUTH = dict.fromkeys(("true", "1", "1.0", "yes"), True)
TRUTH |= dict.fromkeys(("false", "0", "0.0", "no"), False)


def original_size(metadata: Metadata) -> tuple[int | None, int | None]:
    """(width, height) in pixels of the image as published; fractions are cut off."""
    for names in SIZES:
        width, height = (_side(metadata.get(name)) for name in names)
        if width or height:
            return width, height
    return None, None


def watermark_scores(metadata: Metadata) -> list[float]:
    """Probabilities of a watermark, 0..1, as found."""
    return _numbers(metadata, WATERMARK)


def aesthetic_scores(metadata: Metadata) -> list[float]:
    """Predicted ratings, about 0..10, as found; the first is the one to keep."""
    return _numbers(metadata, AESTHETIC)


def nsfw_scores(metadata: Metadata) -> list[float]:
    """Probabilities that the image is not safe for work, 0..1, as found."""
    words = (_find(metadata, name) for name in ("NSFW", "nsfw"))
    known = [NSFW_WORDS.get(word.strip().upper()) for word in words if isinstance(word, str)]
    return _numbers(metadata, NSFW) + [score for score in known if score is not None]


def is_getty(metadata: Metadata) -> bool | None:
    """Whether the image is marked as one of Getty's; None where nobody says."""
    return _flag(metadata, GETTY)


def is_spawning(metadata: Metadata) -> bool | None:
    """Whether its owner opted out with Spawning; None where nobody says."""
    return _flag(metadata, SPAWNING)


SCORES = {"aesthetic": aesthetic_scores, "watermark": watermark_scores, "nsfw": nsfw_scores}
FLAGS = {"getty": is_getty, "spawning": is_spawning}


def is_noai(metadata: Metadata) -> bool:
    """Whether the image was published with `noai` or `noimageai`."""
    tags = (_find(metadata, name) for name in ROBOTS)
    texts = [" ".join(map(str, tag)) if isinstance(tag, list) else tag for tag in tags]
    words = {w for text in texts if isinstance(text, str) for w in re.findall(r"\w+", text.lower())}
    return bool(words.intersection(NOAI)) or _flag(metadata, NOAI) is True


def url_of(metadata: Metadata) -> str | None:
    """Where the image was published; what UTF-8 cannot hold (a lone surrogate) becomes "?"."""
    found = (_find(metadata, name) for name in URL)
    texts = (text.encode(errors="replace").decode() for text in found if isinstance(text, str))
    return next((text for text in texts if text), None)


def digests(metadata: Metadata) -> list[str]:
    """sha256 and md5 (lower-case hex) of the file as published: before a resize changed it."""
    found = (_hex(_find(metadata, name)) for name in DIGESTS)
    return [digest for digest in found if len(digest) in (64, 32)]


def phash_of(metadata: Metadata) -> str | None:
    """The perceptual hash that the data set gives: 16 lower-case hex digits."""
    found = (_hex(_find(metadata, name)) for name in PHASH)
    return next((phash for phash in found if len(phash) == 16), None)


def _find(metadata: Metadata, name: str) -> Any:
    outer, dot, inner = name.partition(".")
    value = metadata.get(outer)
    return value if not dot else value.get(inner) if isinstance(value, Mapping) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _numbers(metadata: Metadata, names: Sequence[str]) -> list[float]:
    found = (_number(_find(metadata, name)) for name in names)
    return [number for number in found if number is not None]


def _side(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and 1 <= number < 2**31 else None


def _flag(metadata: Metadata, names: Sequence[str]) -> bool | None:
    """True where any name says so, else False where any does, else None."""
    found = [TRUTH.get(str(_find(metadata, name)).strip().lower()) for name in names]
    return True if True in found else False if False in found else None


def _hex(value: Any) -> str:
    """Lower-case hex digits, or "" for anything else."""
    text = value.strip().lower() if isinstance(value, str) else ""
    return text if re.fullmatch(r"[0-9a-f]+", text) else ""
