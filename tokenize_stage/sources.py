"""Step 1, image: where samples come from. An image folder or webdataset tars become input shards.

Every input shard becomes one shard of the store, named by it. Whatever cannot be a row is yielded
as a Skipped with a reason `kind: detail`; nothing is left out in silence but directories, hidden
files (a name that starts with a dot) and webdataset's own `__meta__` members.

Image folder: the sub-folders directly below it, sorted, are the classes 0, 1, 2, …; images at its
top have no class. Tars: consecutive members with the same name up to the first dot of the file
name are one sample, of an image (jpg, jpeg, png, webp, …), a class number (cls) and a caption
(txt, else "caption" of json). A sample with a member twice, with two images, or with a label that
cannot be read is skipped whole: which of its parts is right cannot be known. So is the sample at
which a tar turns out to be cut short or corrupt: some of its members may be lost.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
READ_SUFFIXES = (*IMAGE_SUFFIXES, "cls", "txt", "json")
TAR_NAME = re.compile(r"([^/\s=?&]+)\.(?:tar\.gz|tar|tgz)(?![\w.])")
MAX_CLASS_ID = 2**31 - 1  # class_id is an int32 column


@dataclass(frozen=True)
class Sample:
    """One source image as it came: its undecoded bytes and its labels."""

    key: str
    data: bytes
    class_id: int | None
    caption: str | None
    source: str


@dataclass(frozen=True)
class Skipped:
    """A sample that gives no row. `reason` reads `kind: detail`."""

    key: str
    source: str
    reason: str


@dataclass(frozen=True)
class InputShard:
    """What is read to make the shard `name` of the store: a tar, or a part of an image folder.

    source: the tar's path or URL, or the folder. files: relative path and class of every file
    (None: it is a tar). class_names: the folder's sub-folders in the order of their class ids.
    """

    name: str
    source: str
    files: tuple[tuple[str, int | None], ...] | None = None
    class_names: tuple[str, ...] = ()


def list_input_shards(path: str, images_per_shard: int = 10_000) -> list[InputShard]:
    """Expands a path to its input shards, in a fixed order.

    path: image folders, folders of tars, tars; `{0000..0099}` and `*` are expanded, several
    stand between `::`; URLs and `pipe:` commands are opened as webdataset opens them.
    Raises FileNotFoundError where nothing lies, ValueError where two inputs have the same name.
    """
    shards: list[InputShard] = []
    for place in _expand(path):
        if not os.path.isdir(place):
            shards.append(InputShard(_tar_name(place), place))
        elif tars := [name for name in sorted(os.listdir(place)) if TAR_NAME.fullmatch(name)]:
            shards += [InputShard(_tar_name(tar), os.path.join(place, tar)) for tar in tars]
        else:
            shards += _split_folder(place, images_per_shard)
    by_name: dict[str, InputShard] = {}
    for shard in shards:
        other = by_name.setdefault(shard.name, shard)
        if other is not shard:
            raise ValueError(
                f"{other.source} and {shard.source} would both become the shard {shard.name!r}; "
                "rename one, or encode them into two stores"
            )
    return shards


def read_samples(shard: InputShard) -> Iterator[Sample | Skipped]:
    """Yields the samples of a shard in order, and a Skipped for whatever is none.

    A tar that is cut short or corrupt ends with a Skipped that says where. Raises OSError when
    the input as a whole cannot be read: no such file, a failed disk, network or command.
    """
    return _read_tar(shard.source) if shard.files is None else _read_files(shard)


def _expand(path: str) -> list[str]:
    """`::`, braces and globs -> places that exist (URLs are not looked at)."""
    places: list[str] = []
    for place in [path] if os.path.exists(path) else expand_urls(path):
        is_url = re.match(r"\w+:", place) is not None
        found = [place] if is_url or os.path.exists(place) else sorted(glob.glob(place))
        if not found:
            raise FileNotFoundError(f"no tar or folder at {place} (shards_path_or_url={path})")
        places += found
    return places


def _tar_name(place: str) -> str:
    names = TAR_NAME.findall(place)
    if not names:
        raise ValueError(f"{place} is neither a folder nor a .tar, .tar.gz or .tgz")
    return names[-1]


def _split_folder(folder: str, images_per_shard: int) -> list[InputShard]:
    """Every n-th file goes to the same shard, so that each shard has images of all classes."""
    names = tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != "."))
    class_ids = {name: index for index, name in enumerate(names)}
    paths: list[str] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        relative = Path(parent).relative_to(folder)
        paths += [(relative / name).as_posix() for name in files if name[0] != "."]
    if not any(_suffix(path) in IMAGE_SUFFIXES for path in paths):
        raise FileNotFoundError(f"{folder} holds neither tars nor {', '.join(IMAGE_SUFFIXES)}")
    found = [(path, class_ids.get(path.split("/")[0])) for path in sorted(paths)]
    count = -(-len(found) // images_per_shard)
    return [
        InputShard(f"images-{index:05d}", folder, tuple(found[index::count]), names)
        for index in range(count)
    ]


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


def stored_key(name: str) -> str:
    """A file name as text that can be stored: bytes that are no UTF-8 become �."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
