"""Deny lists: URLs, domains and hashes that no image of the store may have.

    # one entry a line; a line that starts with # is a comment; .gz is read, too
    https://example.com/cat.jpg

or Parquet with a column of that kind. Every entry is kept as 64 bits in one sorted array: 8 bytes
an entry, so 10^8 take 0.8 GB (1.2 GB while they are read, in 2 to 3 minutes), and a look-up takes 1
to 6 microseconds. Two different entries share their 64 bits with a probability of 10^8 / 2^64 =
5e-12 a look-up; then an image too many is rejected, never one too few. Nothing is written after the
reading, so threads may share a list.
"""

import gzip
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

COLUMNS = {
    "deny_urls": ("url", "URL"),
    "deny_domains": ("domain",),
    "deny_hashes": ("sha256", "image_hash", "md5", "hash", "phash", "image_phash"),
}
HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{32}|[0-9a-f]{16}")  # sha256, md5, pHash
URL = re.compile(r"(?:(?:[a-zA-Z][\w+.-]*:)?//)?([^/?#]*)(.*)", re.DOTALL)
DOMAIN = re.compile(r"[^\s/:@?#]+")
MAX_LABELS = 127  # of a domain name, by its length of 253


class DenyList:
    """A set of 64-bit numbers in 8 bytes each."""

    def __init__(self, numbers: Iterable[int]):
        """Takes the numbers, 0..2^64-1, in any order."""
        self._sorted = np.fromiter(numbers, np.uint64)
        self._sorted.sort()

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, number: int) -> bool:
        place = int(self._sorted.searchsorted(np.uint64(number)))
        return place < len(self._sorted) and int(self._sorted[place]) == number


def read_deny_list(option: str, paths: Sequence[str]) -> DenyList:
    """Reads the files of filters.deny_urls, deny_domains or deny_hashes, named by `option`.

    Raises FileNotFoundError, and ValueError with file and line for what is no such entry.
    """
    to_number = {
        "deny_urls": url_number,
        "deny_domains": _listed_domain,
        "deny_hashes": _listed_hash,
    }
    return DenyList(
        number for path in paths for number in _numbers(option, Path(path), to_number[option])
    )


def url_number(url: str) -> int:
    """The 64 bits that stand for a URL; scheme, case of the host, :80, :443 and #part are free."""
    host, rest = _split(url)
    return _number(host + (rest.partition("#")[0] or "/"))


def domain_numbers(url: str) -> list[int]:
    """The numbers of the host of a URL and of all domains above it."""
    labels = _split(url)[0].partition(":")[0].split(".")[-MAX_LABELS:]
    return [_number(".".join(labels[start:])) for start in range(len(labels))]


def hash_number(digest: str) -> int:
    """The first 64 bits of a hash in hex."""
    return int(digest[:16], 16)


def _numbers(option: str, path: Path, to_number: Callable[[str], int]) -> Iterator[int]:
    if not path.is_file():
        raise FileNotFoundError(f"filters.{option}: there is no file {path}")
    for place, entry in _rows(option, path) if path.suffix == ".parquet" else _lines(path):
        try:
            yield to_number(entry)
        except ValueError as error:
            raise ValueError(f"filters.{option}: {path}, {place}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    opened = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    with opened as binary, io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            entry = line.strip()
            if entry and entry[0] != "#":
                yield f"line {number}", entry


def _rows(option: str, path: Path) -> Iterator[tuple[str, str]]:
    with pq.ParquetFile(path) as file:
        columns = [name for name in COLUMNS[option] if name in file.schema_arrow.names]
        if not columns:
            legal, found = ", ".join(COLUMNS[option]), ", ".join(file.schema_arrow.names)
            raise ValueError(f"filters.{option}: {path} has none of {legal}; it has {found}")
        for batch in file.iter_batches(columns=columns):
            for name in columns:
                for entry in batch[name].to_pylist():
                    if entry is not None:
                        yield f"column {name}", str(entry)


def _listed_domain(entry: str) -> int:
    domain = entry.removeprefix("*").strip(".")
    if not DOMAIN.fullmatch(domain):
        raise ValueError(f"{entry!r} is no domain such as example.com")
    return _number(_ascii(domain))


def _listed_hash(entry: str) -> int:
    digest = entry.strip().lower()
    if not HASH.fullmatch(digest):
        raise ValueError(f"{entry!r} is no sha256, md5 or perceptual hash: 64, 32, 16 hex digits")
    return hash_number(digest)


def _split(url: str) -> tuple[str, str]:
    """(host with a port that is not the usual one, all after it)."""
    authority, rest = URL.fullmatch(url.strip()).groups()  # type: ignore[union-attr]  # always
    host, _, port = authority.rpartition("@")[2].partition(":")
    host = _ascii(host.rstrip("."))
    return (f"{host}:{port}" if port not in ("", "80", "443") else host), rest


def _ascii(domain: str) -> str:
    """Lower case, and punycode for what has other letters."""
    try:
        return (domain if domain.isascii() else domain.encode("idna").decode()).lower()
    except UnicodeError:  # too long, or no such name: as it is
        return domain.lower()


def _number(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")
