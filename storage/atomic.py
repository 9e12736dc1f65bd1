"""Files that exist whole or not at all: write under another name, flush to disk, rename."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from storage.fingerprint import fingerprint


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed and renamed onto `path`.

    Temporaries of killed writers of the same file go too; a live one then finds `path` in place
    of its own, and leaves it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        try:
            flush(temporary)
            os.replace(temporary, path)
        except FileNotFoundError:
            if not path.is_file():  # else another writer was first, and removed our temporary
                raise
        flush(path.parent)
        for stale in _temporaries(path.parent, f".{path.name}"):
            stale.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory; on success it becomes `path` by one rename.

    The temporary lies in the hidden folder `.staging` beside `path`, under a name of its own for
    every writer. When `path` has been made in the meantime, that one stays and ours is dropped.
    Once `path` is there, temporaries that other writers of it left or are filling are removed.
    """
    staging = path.parent / ".staging"
    temporary = staging / f"{path.name}.{uuid.uuid4().hex}"
    while not temporary.is_dir():
        with suppress(FileNotFoundError):  # another writer may just have removed `staging`
            temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in files:
                flush(Path(folder) / name)
            flush(Path(folder))
        os.rename(temporary, path)
        flush(path.parent)
    except OSError:
        if not path.is_dir():  # else another writer was first, and removed our temporary
            raise
    finally:
        others = _temporaries(staging, path.name) if path.is_dir() else []
        for stale in [temporary, *others]:
            shutil.rmtree(stale, ignore_errors=True)
        with suppress(OSError):
            staging.rmdir()


def sweep_staging(folder: Path) -> None:
    """Removes temporaries of atomic_directory for sub-folders that are there.

    A writer that is killed between its rename and its tidying leaves those that were killed before
    it did; nobody makes these sub-folders again.
    """
    staging = folder / ".staging"
    with suppress(FileNotFoundError):
        for entry in os.listdir(staging):
            if (folder / entry.rpartition(".")[0]).is_dir():
                shutil.rmtree(staging / entry, ignore_errors=True)
    with suppress(OSError):
        staging.rmdir()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` atomically, with the digest of its content under the key "digest"."""
    with atomic_file(path) as temporary:
        temporary.write_text(json_text(value))


def json_text(value: dict[str, Any]) -> str:
    """Indented JSON of `value` plus its digest, the form read_json checks."""
    return json.dumps({**value, "digest": fingerprint(value)}, indent=1) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Reads what write_json wrote. Raises ValueError naming the file when a byte has changed."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """json_text backwards. Raises ValueError, naming the file, when a byte has changed."""
    try:
        value = json.loads(content)
        digest = value.pop("digest")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} is damaged: {error!r}; restore it or encode it again") from None
    if digest != fingerprint(value):
        raise ValueError(f"{name} is damaged: its digest is not that of its content; restore it")
    return value


def flush(path: Path) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporaries(folder: Path, name: str) -> list[Path]:
    """What writers of `name` left or are filling: the name, a dot and 32 hex digits."""
    form = re.compile(re.escape(name) + r"\.[0-9a-f]{32}")
    with suppress(FileNotFoundError):  # `folder` is gone
        return [folder / entry for entry in os.listdir(folder) if form.fullmatch(entry)]
    return []
