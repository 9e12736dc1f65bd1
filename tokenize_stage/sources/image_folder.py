"""An image folder: the sub-folders directly below it are classes; images at its top have none."""

import errno
import os
import stat
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path

from tokenize_stage.sources.class_index import ClassIndex, index_of
from tokenize_stage.sources.sample import (
    IMAGE_SUFFIXES,
    InputShard,
    Sample,
    Skipped,
    stored_key,
    suffix_of,
)
from tokenize_stage.sources.watch import Watch, map_ahead

THREADS = 8  # files read at once: a file of a network file system takes milliseconds
OF_THE_FILE = {  # errors that are not the disk's
    getattr(errno, name)
    for name in ("ENOENT", "EACCES", "EPERM", "EISDIR", "ENOTDIR", "ELOOP", "ENAMETOOLONG")
}


def folder_shards(folder: str, images_per_shard: int, classes: ClassIndex) -> list[InputShard]:
    """Every n-th file goes to the same shard, so that each shard has images of all classes.

    classes: of dataset.class_index; without any, the sub-folders in the order of their names.
    Raises ValueError for a sub-folder that is none of `classes`.
    """
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")
    classes = classes if classes.ids else index_of(names)
    class_ids = {name: classes.of(name) for name in names}
    paths = sorted(_walk(folder))
    if not any(suffix_of(path) in IMAGE_SUFFIXES for path in paths):
        raise FileNotFoundError(f"{folder} holds neither tars nor {', '.join(IMAGE_SUFFIXES)}")
    found = [(path, class_ids.get(path.split("/")[0])) for path in paths]
    count = -(-len(found) // images_per_shard)
    return [
        InputShard(f"images-{index:05d}", folder, tuple(found[index::count]), classes.names)
        for index in range(count)
    ]


def read_folder(
    shard: InputShard, watch: Watch, max_bytes: int
) -> Generator[Sample | Skipped, None, None]:
    """The files of a shard. Raises OSError when the disk fails or the folder is gone."""
    read = partial(_read_file, shard.source, watch, max_bytes)
    yield from map_ahead(read, shard.files or (), THREADS)


def read_regular_file(path: str, watch: Watch, max_bytes: int) -> bytes:
    """The bytes of an image file. Raises ValueError, as `kind: detail`, for what is none."""
    mode = os.stat(path)
    if not stat.S_ISREG(mode.st_mode):
        raise ValueError(f"no regular file: {_kind_of(path, mode.st_mode)}")
    with open(path, "rb", buffering=0) as file:
        data = file.read(max_bytes + 1) if mode.st_size <= max_bytes else b""
        watch.sign()
        while data and len(data) < mode.st_size and (more := file.read(max_bytes + 1 - len(data))):
            data += more
    if mode.st_size > max_bytes or len(data) > max_bytes:
        raise ValueError(f"sample too large: {mode.st_size} bytes, at most {max_bytes}")
    return data


def _walk(folder: str) -> Iterator[str]:
    """The files below a folder, and what is named like an image but is a folder; none hidden.

    A link to a folder above itself is given as if it were a file, and not followed. Raises OSError
    for a sub-folder that cannot be read.
    """
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = [name for name in folders if name[0] != "."]
        loops = {name for name in folders if _is_loop(Path(parent, name), Path(folder))}
        folders[:] = [name for name in folders if name not in loops]
        odd = [name for name in folders if suffix_of(name) in IMAGE_SUFFIXES]
        relative = Path(parent).relative_to(folder)
        for name in (*files, *loops, *odd):
            if name[0] != ".":
                yield (relative / name).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _is_loop(path: Path, folder: Path) -> bool:
    """Whether a link below `folder` leads to a folder through which it was reached, or above it."""
    if not path.is_symlink():
        return False
    reached = [parent for parent in path.parents if parent.is_relative_to(folder)]
    return any(parent.resolve().is_relative_to(path.resolve()) for parent in reached)


def _read_file(
    folder: str, watch: Watch, max_bytes: int, file: tuple[str, int | None]
) -> Sample | Skipped:
    name, class_id = file
    key, path = stored_key(name), os.path.join(folder, name)
    is_image = suffix_of(name) in IMAGE_SUFFIXES
    if not is_image and not os.path.isdir(path):
        return Skipped(key, folder, f"not an image file: .{suffix_of(name)}")
    try:
        return Sample(key, read_regular_file(path, watch, max_bytes), class_id, None, folder)
    except ValueError as error:
        return Skipped(key, folder, str(error))
    except OSError as error:
        if error.errno not in OF_THE_FILE or not os.path.isdir(folder):
            raise  # the disk fails, or the whole folder went away: no fault of this file
        return Skipped(key, folder, f"unreadable file: {error.strerror}")


def _kind_of(path: str, mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a link to a folder" if os.path.islink(path) else "a folder"
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
