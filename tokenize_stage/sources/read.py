"""Reads the samples of an input shard, one after the other."""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from webdataset.gopen import gopen

from tokenize_stage.sources.input_shards import InputShard
from tokenize_stage.sources.sample import (
    IMAGE_SUFFIXES,
    MAX_CLASS_ID,
    Sample,
    Skipped,
    stored_key,
)

READ_SUFFIXES = (*IMAGE_SUFFIXES, "cls", "txt", "json")


def read_samples(shard: InputShard) -> Iterator[Sample | Skipped]:
    """Yields the samples of a shard in order, and a Skipped for whatever is none.

    A tar that is cut short or corrupt ends with a Skipped that says where. Raises OSError when
    the input as a whole cannot be read: no such file, a failed disk, network or command.
    """
    return _read_tar(shard.source) if shard.files is None else _read_files(shard)


def _read_files(shard: InputShard) -> Iterator[Sample | Skipped]:
    for path, class_id in shard.files or ():
        key = stored_key(path)
        if _suffix(path) not in IMAGE_SUFFIXES:
            yield Skipped(key, shard.source, f"not an image file: .{_suffix(path)}")
            continue
        try:
            data = Path(shard.source, path).read_bytes()
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            if not os.path.isdir(shard.source):
                raise  # the whole folder went away: no fault of this file
            yield Skipped(key, shard.source, f"unreadable file: {error.strerror}")
            continue
        yield Sample(key, data, class_id, None, shard.source)


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of the archive; here it is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictTarInfo":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the block of zeros that does end it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


@dataclass
class _Group:
    """The members of one sample, by suffix, while a tar is walked."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""


def _read_tar(source: str) -> Iterator[Sample | Skipped]:
    group, count = _Group(""), 0
    try:
        with (
            gopen(source) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
                folder, slash, name = member.name.rpartition("/")
                if member.isdir() or name[0] == "." or re.match("__[^/]*__($|/)", member.name):
                    continue
                stem, _, suffix = name.partition(".")
                key = stored_key(f"{folder}{slash}{stem}")
                if key != group.key:
                    if group.parts:
                        yield _to_sample(group, source)
                        count += 1
                    group = _Group(key)
                _read_member(tar, member, suffix.lower(), group)
    except tarfile.TarError as error:
        detail = f"tar cut short or corrupt: after {count} samples, {error}"
        yield Skipped(group.key, source, detail)
    else:
        if group.parts:
            yield _to_sample(group, source)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, group: _Group) -> None:
    if suffix in group.parts:
        group.fault = f"duplicate member: {stored_key(member.name)}"
    elif suffix in READ_SUFFIXES and not member.isreg():
        group.fault = f"member is no regular file: {stored_key(member.name)}"
    file = tar.extractfile(member) if suffix in READ_SUFFIXES and member.isreg() else None
    group.parts[suffix] = file.read() if file else b""


def _to_sample(group: _Group, source: str) -> Sample | Skipped:
    parts = group.parts
    images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
    if group.fault:
        return Skipped(group.key, source, group.fault)
    if len(images) != 1:
        kind = "several images" if images else "no image"
        return Skipped(group.key, source, f"{kind}: members {', '.join(map(stored_key, parts))}")
    reading = ""
    try:
        reading = "cls"
        class_id = int(parts["cls"]) if "cls" in parts else None
        if class_id is not None and not 0 <= class_id <= MAX_CLASS_ID:
            raise ValueError(f"class {class_id} is not in 0..{MAX_CLASS_ID}")
        reading = "txt" if "txt" in parts else "json"
        caption = _caption(parts)
    except (ValueError, RecursionError) as error:
        return Skipped(group.key, source, f"unreadable {reading}: {error}")
    return Sample(group.key, parts[images[0]], class_id, caption, source)


def _caption(parts: dict[str, bytes]) -> str | None:
    if "txt" in parts:
        return parts["txt"].decode()
    content = json.loads(parts["json"]) if "json" in parts else {}
    if not isinstance(content, dict):
        raise ValueError("not an object")
    caption = content.get("caption")
    if not isinstance(caption, str | None):
        raise ValueError(f"caption is a {type(caption).__name__}")
    return caption and caption.encode().decode()  # a lone surrogate is an error here


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()
