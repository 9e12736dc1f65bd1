"""dataset.shards_path_or_url -> places: paths, URLs and `pipe:` commands, one by one, in order."""

import glob
import os
import re
from collections.abc import Iterator, Sequence

import fsspec
from webdataset.shardlists import expand_urls

from tokenize_stage.sources.stream import URL, check_protocol


def expand_places(given: str | Sequence[str]) -> list[str]:
    """Expands lists, `::`, braces, globs (of URLs too) and @FILE, a place or pattern a line.

    URLs without a glob are not looked at. Raises FileNotFoundError where nothing lies, ValueError
    for a URL of a protocol that cannot be read.
    """
    places: list[str] = []
    for text in [given] if isinstance(given, str) else given:
        for pattern in _expand(text):
            listed = pattern.startswith("@") and not os.path.exists(pattern)
            for line in _lines(pattern[1:]) if listed else [pattern]:
                for place in _expand(line) if listed else [line]:
                    places += _found(place.removeprefix("file://"), text)
    return places


def _expand(text: str) -> list[str]:
    return [text] if os.path.exists(text) else expand_urls(text)


def _lines(path: str) -> Iterator[str]:
    """What is listed in a file; empty lines and those that begin with # are none."""
    with fsspec.open(path, "r", encoding="utf-8") as file:
        for line in map(str.strip, file):
            if line and line[0] != "#":
                yield line


def _found(place: str, given: str) -> list[str]:
    if os.path.exists(place) or re.match(r"pipe:|https?://", place):
        return [place]
    if URL.match(place):
        check_protocol(place)
        if not glob.has_magic(place):
            return [place]
        filesystem, path = fsspec.url_to_fs(place)
        found = [filesystem.unstrip_protocol(name) for name in sorted(filesystem.glob(path))]
    else:
        found = sorted(glob.glob(place))
    if not found:
        raise FileNotFoundError(
            f"no tar, table or folder at {place} (shards_path_or_url={given}); check the path"
        )
    return found
