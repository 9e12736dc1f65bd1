"""Parts of remote files kept on a local disk, up to a number of bytes; the least recently used go.

One file an entry, written whole by one rename, so any number of processes share a folder. Entries
are not checked: the reader's checksums are, and a wrong entry is fetched anew (`fresh=True`).
"""

import hashlib
import os
import re
import uuid
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_ENTRY = re.compile(r"[0-9a-f]{32,64}\.range")  # what may be evicted: nobody else's files
_BLOCK = 4096  # what a small file takes on a disk


def default_cache_directory() -> Path:
    """$MUSE_CACHE_DIR, else $XDG_CACHE_HOME/open-muse, else ~/.cache/open-muse."""
    if own := os.environ.get("MUSE_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "open-muse"


@dataclass(frozen=True)
class CacheOptions:
    """Where remote bytes are kept, and how many; 0 keeps none."""

    directory: Path = field(default_factory=default_cache_directory)
    max_bytes: int = 10 * 2**30


class FileCache:
    """A folder of entries by key. Eight processes at once stay within `max_bytes`.

    A process looks at the folder before every `max_bytes / 64` that it adds, and cuts to three
    quarters what has passed seven eighths.
    """

    def __init__(self, options: CacheOptions):
        self.options = options
        self._unseen: int | None = None  # bytes added since the last look; None before the first

    def get(self, key: str, length: int) -> bytes | None:
        """The entry, or None when there is none of that length."""
        if not self.options.max_bytes:
            return None
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)  # just used
        except OSError:
            return None
        return data if len(data) == length else None

    def put(self, key: str, data: bytes) -> None:
        """Keeps an entry. A disk that does not take it is a warning, not an error."""
        if _on_disk(len(data)) > self.options.max_bytes // 2:
            return
        temporary = self.options.directory / f"{uuid.uuid4().hex}.range"
        try:
            self.options.directory.mkdir(parents=True, exist_ok=True)
            self._make_room(_on_disk(len(data)))
            temporary.write_bytes(data)
            os.replace(temporary, self._path(key))
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            warnings.warn(
                f"the cache {self.options.directory} takes no more: {error}; free the disk or set "
                "MUSE_CACHE_DIR. Reading goes on without it",
                stacklevel=2,
            )

    def _path(self, key: str) -> Path:
        return self.options.directory / f"{hashlib.sha256(key.encode()).hexdigest()}.range"

    def _make_room(self, size: int) -> None:
        limit = self.options.max_bytes
        if self._unseen is not None and self._unseen + size <= limit // 64:
            self._unseen += size
            return
        self._unseen = 0
        entries = sorted(_entries(self.options.directory))
        total = size + sum(entry_size for _, entry_size, _ in entries)
        if total <= limit * 7 // 8:
            return
        for _, entry_size, path in entries:
            with suppress(FileNotFoundError):  # another process was first
                os.unlink(path)
            total -= entry_size
            if total <= limit * 3 // 4:
                return


def _entries(directory: Path) -> list[tuple[int, int, str]]:
    """(time of last use in ns, bytes on disk, path) of every entry."""
    found = []
    with os.scandir(directory) as listing:
        for entry in listing:
            if _ENTRY.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, _on_disk(status.st_size), entry.path))
    return found


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
