"""A store behind a URL: byte ranges by fsspec, many at once, kept on a local disk, asked again.

read_ranges -> cache -> plan_requests -> requests up to PIECE_BYTES, CONNECTIONS at a time, each
given Patience -> cut into the ranges asked for. Ranges are of files that never change, and cached;
whole files (`read`) and listings always come from the server.
"""

import asyncio
import bisect
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import fsspec
from fsspec.asyn import AsyncFileSystem

from storage.file_cache import CacheOptions, FileCache
from storage.patience import Patience, http_status, repeat

PIECE_BYTES = 2 * 2**20  # the most one request asks for: 16 of them in 30 s are 1.1 MB/s
GAP_BYTES = 64 * 2**10  # ranges this near are asked for as one: cheaper than a round trip
CONNECTIONS = 16
WHOLE_LIMIT = 64 * 2**20  # a server that ignores ranges may send files up to this size

T = TypeVar("T")
Span = tuple[int, int]


@dataclass
class Traffic:
    """What a RemoteFiles has done since it was opened."""

    requests: int = 0
    retries: int = 0
    bytes_fetched: int = 0
    cache_hits: int = 0

    def count_retry(self) -> None:
        self.retries += 1


class RemoteFiles:
    """The files below a URL. Survives a fork; several threads may read at once.

    Raises what storage.patience.repeat does, naming the URL of the file. A file system that is not
    asynchronous (memory, sftp) is read in threads.
    """

    def __init__(
        self, url: str, cache: CacheOptions | None = None, patience: Patience | None = None
    ):
        self.url = url.rstrip("/")
        self.patience = patience or Patience()
        self.traffic = Traffic()
        self._connect()
        options = cache or (CacheOptions(max_bytes=0) if self._is("memory") else CacheOptions())
        self._cache = FileCache(options)

    def read(self, name: str) -> bytes:
        return self._run(self._fetch_whole, name)

    def read_range(self, name: str, start: int, length: int, *, fresh: bool = False) -> bytes:
        return self.read_ranges(name, [(start, length)], fresh=fresh)[0]

    def read_ranges(self, name: str, ranges: list[Span], *, fresh: bool = False) -> list[bytes]:
        found: dict[Span, bytes] = {}
        for start, length in [] if fresh else set(ranges):
            data = self._cache.get(self._key(name, start, length), length)
            if data is not None:
                found[start, length] = data
        self.traffic.cache_hits += len(found)
        missing = sorted(set(ranges) - found.keys())
        if missing:
            spans = plan_requests(missing)
            bodies = self._run(self._fetch_spans, name, spans)
            for start, length in missing:
                data = found[start, length] = _cut(start, start + length, spans, bodies)
                self._cache.put(self._key(name, start, length), data)
        return [found[wanted] for wanted in ranges]

    def exists(self, name: str) -> bool:
        try:
            self._run(self._fetch, name, 0, 1, 0)
        except FileNotFoundError:
            return False
        return True

    def local_path(self, name: str) -> Path | None:
        return None

    def _connect(self) -> None:
        try:
            self._filesystem, root = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f'{self.url} cannot be opened: {error}; pip install "open-muse[remote]" brings '
                "s3, gs and https, another protocol needs its own package"
            ) from None
        self._root = root.rstrip("/")
        self._process = os.getpid()

    def _is(self, protocol: str) -> bool:
        known = self._filesystem.protocol
        return protocol in ((known,) if isinstance(known, str) else known)

    def _path(self, name: str) -> str:
        return f"{self._root}/{quote(name) if self._is('http') else name}"

    def _key(self, name: str, start: int, length: int) -> str:
        return f"{self.url}\n{name}\n{start}\n{length}"

    def _run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        if os.getpid() != self._process:  # connections and fsspec's thread stay with the parent
            self._connect()
        return fsspec.asyn.sync(fsspec.asyn.get_loop(), function, *args)

    async def _fetch_whole(self, name: str) -> bytes:
        data = bytearray()
        while True:
            piece = await self._fetch(name, len(data), PIECE_BYTES, 0)
            data += piece
            if len(piece) != PIECE_BYTES:
                return bytes(data)

    async def _fetch_spans(self, name: str, spans: list[Span]) -> list[bytes]:
        free = asyncio.Semaphore(CONNECTIONS)

        async def fetch(start: int, stop: int) -> bytes:
            length = stop - start
            async with free:
                return (await self._fetch(name, start, length, length))[:length]

        tasks = [asyncio.create_task(fetch(*span)) for span in spans]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _fetch(self, name: str, start: int, length: int, least: int) -> bytes:
        """`length` bytes from `start` on, `least` or more where the file ends before.

        All there are from `start` on when the server sends the whole file.
        """
        path = self._path(name)

        async def attempt() -> bytes:
            data = await self._request(path, start, start + length)
            if len(data) < least:
                stop = start + len(data)
                if await self._request(path, stop, stop + 1):
                    raise ConnectionError(f"{length} bytes asked for, {len(data)} came")
                raise ValueError(
                    f"{self.url}/{name} is truncated: bytes {start}..{start + length} asked for, "
                    f"it ends at {stop} or before; copy it there anew"
                )
            return data

        return await repeat(f"{self.url}/{name}", attempt, self.patience, self.traffic.count_retry)

    async def _request(self, path: str, start: int, stop: int) -> bytes:
        """One request. Past the end of the file there are no bytes."""
        filesystem, whole, options = self._filesystem, False, {}

        async def look(reply: Any) -> None:
            nonlocal whole
            whole = reply.status == 200  # not 206: not the range
            if whole and (reply.content_length or 0) > WHOLE_LIMIT:
                raise ValueError(
                    f"{path}: the server ignores byte ranges and sends all {reply.content_length} "
                    "bytes; serve the store by one that knows them (nginx, caddy, S3) or copy it"
                )

        if self._is("http"):
            headers = {"Accept-Encoding": "identity"}  # ranges of the file, not of its gzip
            options = {"headers": headers, "raise_for_status": look}
        self.traffic.requests += 1
        try:
            if isinstance(filesystem, AsyncFileSystem):
                data = await filesystem._cat_file(path, start=start, end=stop, **options)
            else:
                data = await asyncio.to_thread(filesystem.cat_file, path, start=start, end=stop)
        except Exception as error:
            if http_status(error) != 416:
                raise
            return b""
        self.traffic.bytes_fetched += len(data)
        return data[start:] if whole else data

    async def _list(self, path: str) -> list[str]:
        filesystem = self._filesystem
        filesystem.invalidate_cache(path)
        if isinstance(filesystem, AsyncFileSystem):
            return await filesystem._ls(path, detail=False)
        return await asyncio.to_thread(filesystem.ls, path, detail=False)

    def list(self, name: str) -> list[str] | None:  # last: below it `list` is this method
        if self._is("http"):
            return None
        path = self._path(name).rstrip("/")
        url, count = f"{self.url}/{name}", self.traffic.count_retry
        try:
            found = self._run(repeat, url, lambda: self._list(path), self.patience, count)
        except FileNotFoundError:
            return []
        except NotImplementedError:
            return None
        paths = {entry.rstrip("/") for entry in found} - {path}  # S3 may list the folder itself
        return sorted(entry.rsplit("/", 1)[-1] for entry in paths)


def plan_requests(ranges: list[Span]) -> list[Span]:
    """Spans (start, stop) that cover every (start, length): sorted, apart, up to PIECE_BYTES each.

    Ranges at most GAP_BYTES apart share a span.
    """
    blocks: list[list[int]] = []
    for start, length in sorted(ranges):
        if length and blocks and start <= blocks[-1][1] + GAP_BYTES:
            blocks[-1][1] = max(blocks[-1][1], start + length)
        elif length:
            blocks.append([start, start + length])
    spans: list[Span] = []
    for start, stop in blocks:
        pieces = -(-(stop - start) // PIECE_BYTES)
        bounds = [start + (stop - start) * piece // pieces for piece in range(pieces + 1)]
        spans += zip(bounds, bounds[1:], strict=False)
    return spans


def _cut(start: int, stop: int, spans: list[Span], bodies: list[bytes]) -> bytes:
    """Bytes start..stop out of the bodies of the spans."""
    parts = []
    index = bisect.bisect(spans, start, key=lambda span: span[0]) - 1
    while start < stop:
        first, start_of_next = spans[index]
        parts.append(bodies[index][start - first : stop - first])
        start, index = start_of_next, index + 1
    return b"".join(parts)
