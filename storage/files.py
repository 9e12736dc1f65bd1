"""Where a store's files lie: a folder, or any URL that fsspec knows. Readers see no difference.

Names are relative to the store and '/'-separated ("shards/00000/codes.zarr/c/0/0"). Reading only:
stores are written to a local file system and copied to a bucket afterwards.
"""

import os
from pathlib import Path
from typing import Protocol

from storage.file_cache import CacheOptions
from storage.patience import Patience
from storage.remote_files import RemoteFiles

REMEDY = "restore it, or delete its shard folder and encode it again"


class StoreFiles(Protocol):
    """The files of one store. `url` names it in messages."""

    @property
    def url(self) -> str: ...

    def read(self, name: str) -> bytes:
        """A whole file, never from a cache. Raises FileNotFoundError with its URL."""
        ...

    def read_range(self, name: str, start: int, length: int, *, fresh: bool = False) -> bytes:
        """Exactly `length` bytes from `start` on; `fresh` asks past the cache and mends it.

        Raises FileNotFoundError, or ValueError naming the file when it ends before.
        """
        ...

    def read_ranges(
        self, name: str, ranges: list[tuple[int, int]], *, fresh: bool = False
    ) -> list[bytes]:
        """read_range for every (start, length), in order; at the same time where it is remote."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file (not a folder) of that name."""
        ...

    def list(self, name: str) -> list[str] | None:
        """Names directly below a folder, sorted; [] without the folder; None where no one can."""
        ...

    def local_path(self, name: str) -> Path | None:
        """Its path on this machine's file system, for mapping it; None when it is remote."""
        ...


def open_files(
    location: str | Path, cache: CacheOptions | None = None, patience: Patience | None = None
) -> StoreFiles:
    """The files below a folder ("dir", Path, "file://dir") or a URL ("s3://bucket/store", ...).

    `cache` and `patience` matter to remote stores only; None means their defaults.
    """
    text = str(location)
    if text.startswith("file://") or "://" not in text:
        return LocalFiles(Path(text.removeprefix("file://")))
    return RemoteFiles(text, cache, patience)


class LocalFiles:
    """A folder; `fresh` changes nothing, as nothing is cached."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.url = str(folder)

    def read(self, name: str) -> bytes:
        return self.local_path(name).read_bytes()

    def read_range(self, name: str, start: int, length: int, *, fresh: bool = False) -> bytes:
        return self.read_ranges(name, [(start, length)])[0]

    def read_ranges(
        self, name: str, ranges: list[tuple[int, int]], *, fresh: bool = False
    ) -> list[bytes]:
        path = self.local_path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: {REMEDY}") from None
        try:
            return [_pread(descriptor, path, start, length) for start, length in ranges]
        finally:
            os.close(descriptor)

    def exists(self, name: str) -> bool:
        return self.local_path(name).is_file()

    def list(self, name: str) -> list[str] | None:
        try:
            return sorted(os.listdir(self.local_path(name)))
        except FileNotFoundError:
            return []

    def local_path(self, name: str) -> Path:
        return self.folder / name


def _pread(descriptor: int, path: Path, start: int, length: int) -> bytes:
    data = os.pread(descriptor, length, start)
    while len(data) < length:  # the system hands out at most 2 GiB at once
        more = os.pread(descriptor, length - len(data), start + len(data))
        if not more:
            size = os.fstat(descriptor).st_size
            raise ValueError(
                f"{path} is truncated: bytes {start}..{start + length} asked for, it has {size}; "
                f"{REMEDY}"
            )
        data += more
    return data
