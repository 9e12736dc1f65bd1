"""Tars: webdataset's layout, and ImageNet's, where a tar (or a tar in a tar) is a class.

Consecutive members with the same name up to the first dot of the file name are one sample, of an
image (jpg, jpeg, png, webp, …), a class number (cls), a caption (txt, else "caption" of json) and
metadata (json). A sample with a member twice, with two images, or with a label that cannot be read
is skipped whole: which of its parts is right cannot be known. So is the sample at which a tar turns
out to be cut short or corrupt: some of its members may be lost.
"""

import json
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from storage.tar_samples import TarSample, read_tar_samples, tar_members
from tokenize_stage.sources.class_index import WORDNET_ID, ClassIndex, index_of
from tokenize_stage.sources.sample import (
    IMAGE_SUFFIXES,
    InputShard,
    Sample,
    Skipped,
    TarPart,
    checked_caption,
    checked_class_id,
    stored_key,
)
from tokenize_stage.sources.stream import CHUNK_BYTES, Stream, open_file, open_stream
from tokenize_stage.sources.watch import ReadPatience, Watch

TAR_NAME = re.compile(r"([^/\s=?&]+)\.(?:tar\.gz|tar|tgz)(?![\w.])")
TAR_OF_TARS = re.compile(r"ILSVRC\w*\.tar")  # ImageNet's ILSVRC2012_img_train.tar
READ_SUFFIXES = frozenset((*IMAGE_SUFFIXES, "cls", "txt", "json"))


def tar_shards(
    places: list[str], classes: ClassIndex, caption: str | None = None
) -> list[InputShard]:
    """A shard a tar, named by it; of a local ILSVRC….tar, a shard for every tar within.

    A tar with the name of a WordNet id is a class. caption: the name that captions have in the
    metadata; None: a member txt, else "caption". Raises ValueError for what is no tar by name.
    """
    tars = [tar for place in places for tar in _inner_tars(place) or [(place, place, 0, None)]]
    names = [_tar_name(source) for source, *_ in tars]
    labels = {name for name in names if WORDNET_ID.fullmatch(name)}
    classes = classes if classes.ids else index_of(sorted(labels))
    shards = []
    for name, (source, path, offset, size) in zip(names, tars, strict=True):
        class_id = classes.of(name) if name in labels else None
        is_plain = name not in labels and caption is None
        part = None if is_plain else TarPart(path, class_id, offset, size, caption)
        shards.append(InputShard(name, source, class_names=classes.names, tar=part))
    return shards


def read_tar(
    shard: InputShard, watch: Watch, patience: ReadPatience
) -> Generator[Sample | Skipped, None, None]:
    """The samples of a tar; one that is cut short or corrupt ends with a Skipped that says where.

    Raises OSError when its bytes cannot be had: no such file, a failed disk, network or command.
    """
    class_id, caption = (shard.tar.class_id, shard.tar.caption) if shard.tar else (None, None)
    is_empty = True
    with _open(shard, watch, patience.timeout_s) as stream:
        for sample in read_tar_samples(
            cast(IO[bytes], stream),
            READ_SUFFIXES.__contains__,
            patience.max_sample_bytes,
            patience.max_shard_bytes,
        ):
            is_empty = False
            yield _to_sample(sample, shard.source, class_id, caption)
    if is_empty:
        yield Skipped("", shard.source, "empty tar: it has no samples")


def _tar_name(place: str) -> str:
    names = TAR_NAME.findall(place)
    if not names:
        raise ValueError(
            f"{place} is neither a folder nor a .tar, .tar.gz, .tgz, .parquet, .arrow, .csv or "
            ".tsv; of a URL of a folder, give a glob: …/*.tar"
        )
    return names[-1]


def _inner_tars(place: str) -> list[tuple[str, str, int, int | None]]:
    """(source, path, offset, size) of the tars in ImageNet's tar of tars, on a local disk."""
    if not TAR_OF_TARS.fullmatch(os.path.basename(place)) or not os.path.isfile(place):
        return []
    with open_file(place) as file:
        members = tar_members(file)
        first = next(members, None)
        if first is None or not first[0].endswith(".tar"):
            return []  # of the validation images
        return [(f"{place}/{name}", place, start, size) for name, start, size in (first, *members)]


@contextmanager
def _open(shard: InputShard, watch: Watch, timeout_s: float) -> Iterator[Stream]:
    part = shard.tar
    if part is None or part.size is None:
        with open_stream(part.path if part else shard.source, watch, timeout_s) as stream:
            yield stream
        return
    with open_file(part.path) as file:
        file.seek(part.offset)
        yield _Part(file, watch, part.size)


class _Part(Stream):
    """Some bytes of a file from where it stands."""

    def __init__(self, opened: IO[bytes], watch: Watch, size: int):
        super().__init__(opened, watch)
        self._left = size

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        data = super().read(min(size, self._left)) if self._left else b""
        self._left -= len(data)
        return data


def _to_sample(
    sample: TarSample, source: str, class_id: int | None, caption_name: str | None
) -> Sample | Skipped:
    parts, key = sample.parts, sample.key
    if sample.fault:
        return Skipped(key, source, sample.fault)
    images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        kind = "several images" if images else "no image"
        return Skipped(key, source, f"{kind}: members {', '.join(map(stored_key, parts))}")
    reading = ""
    try:
        reading = "cls"
        if "cls" in parts:
            class_id = checked_class_id(int(parts["cls"]))
        reading = "json"
        metadata = _metadata(parts["json"]) if "json" in parts else {}
        caption = metadata.get(caption_name or "caption")
        if caption_name is None and "txt" in parts:
            reading = "txt"
            caption = parts["txt"].decode()
        caption = checked_caption(caption)
    except (ValueError, RecursionError) as error:
        return Skipped(key, source, f"unreadable {reading}: {error}")
    return Sample(key, parts[images[0]], class_id, caption, source, metadata)


def _metadata(content: bytes) -> dict[str, Any]:
    metadata = json.loads(content)
    if not isinstance(metadata, dict):
        raise ValueError("not an object")
    if b"\\ud" in content.lower():  # a lone surrogate is no text that a table can hold
        json.dumps(metadata, ensure_ascii=False).encode()
    return metadata
