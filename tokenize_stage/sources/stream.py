"""The bytes of a source: a file, a `pipe:` command, http(s), or any URL that fsspec knows."""

import http.client
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any
from urllib.parse import quote

import fsspec
import pyarrow as pa

from tokenize_stage.sources.watch import Watch

URL = re.compile(r"[A-Za-z][\w+.-]*://")
CHUNK_BYTES = 2**20
BLOCK_BYTES = 8 * 2**20  # of one request to a bucket
SIGPIPE_STATUS = (-signal.SIGPIPE, 128 + signal.SIGPIPE)  # of the command, and of its shell


class Stream:
    """read(size) of an opened source: up to size bytes, b"" at its end."""

    def __init__(self, opened: Any, watch: Watch):
        self._opened, self._watch = opened, watch
        self._read = getattr(opened, "read1", opened.read)  # what has come, without waiting for all

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        data = self._read(size)
        self._watch.sign()
        return data or self._end()

    def _end(self) -> bytes:
        return b""


@contextmanager
def open_stream(source: str, watch: Watch, timeout_s: float) -> Generator[Stream, None, None]:
    """Opens a source for reading from its start. Raises OSError, also when it breaks off.

    `pipe:` commands run in a shell, are killed with all that they started when the block ends, and
    fail the reading of their last byte when they fail.
    """
    if source.startswith("pipe:"):
        with _run(source.removeprefix("pipe:"), watch) as process:
            yield _Command(process, watch)
    elif source.startswith(("http://", "https://")):
        with _request(source, timeout_s) as response:
            yield _Response(response, watch)
    else:
        with open_file(source) as opened:
            yield Stream(opened, watch)


def open_file(source: str) -> IO[bytes]:
    """A file that can seek: local, or of a URL. Raises ValueError for an unknown protocol."""
    if not URL.match(source):
        return open(source, "rb", buffering=0)
    check_protocol(source)
    filesystem, path = fsspec.url_to_fs(source)
    return filesystem.open(path, "rb", block_size=BLOCK_BYTES)


@contextmanager
def open_arrow(path: str) -> Generator[pa.RecordBatchReader, None, None]:
    """The record batches of a local Arrow file, mapped; of the streaming or the file format."""
    if URL.match(path):
        raise ValueError(f"{path}: Arrow files are read from a disk only; copy it, or use Parquet")
    with pa.memory_map(path) as mapped:
        if mapped.read(6) == b"ARROW1":
            file = pa.ipc.open_file(mapped)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
            yield pa.RecordBatchReader.from_batches(file.schema, batches)
        else:
            mapped.seek(0)
            yield pa.ipc.open_stream(mapped)


def check_protocol(source: str) -> None:
    """Raises ValueError where the package that reads a URL is not installed."""
    try:
        fsspec.get_filesystem_class(source.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise ValueError(
            f'{source} cannot be opened: {error}; pip install "open-muse[remote]" brings s3, gs '
            "and https, another protocol needs its own package"
        ) from None


def read_whole(source: str, watch: Watch, timeout_s: float, max_bytes: int) -> bytes:
    """All bytes of a small source; of a larger one, max_bytes + 1 of them."""
    pieces, missing = [], max_bytes + 1
    with open_stream(source, watch, timeout_s) as stream:
        while missing and (piece := stream.read(min(missing, CHUNK_BYTES))):
            pieces.append(piece)
            missing -= len(piece)
    return b"".join(pieces)


class _Command(Stream):
    def __init__(self, process: subprocess.Popen[bytes], watch: Watch):
        super().__init__(process.stdout, watch)
        self._process = process

    def _end(self) -> bytes:
        status = self._process.wait()
        if status and status not in SIGPIPE_STATUS:
            raise OSError(f"the command ended with status {status}")
        return b""


@contextmanager
def _run(command: str, watch: Watch) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, shell=True, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
    )
    assert process.stdout is not None

    def kill() -> None:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    watch.close.append(kill)
    try:
        if watch.given_up.is_set():
            kill()
        yield process
    finally:
        kill()
        process.stdout.close()
        process.wait()


class _Response(Stream):
    def __init__(self, opened: http.client.HTTPResponse, watch: Watch):
        super().__init__(opened, watch)
        self._missing = opened.length or 0  # a chunked answer says itself where it ends

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        try:
            data = super().read(size)
        except http.client.HTTPException as error:
            raise ConnectionError(f"the answer broke off: {error!r}") from error
        self._missing -= len(data)
        return data

    def _end(self) -> bytes:
        if self._missing > 0:  # http.client takes a closed connection for the end
            raise ConnectionError(f"the answer broke off {self._missing} bytes before its end")
        return b""


def _request(url: str, timeout_s: float) -> http.client.HTTPResponse:
    try:
        # what stands between % and ) has a meaning in URLs; blanks and letters beyond ASCII do not
        return urllib.request.urlopen(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), timeout=timeout_s)
    except (http.client.HTTPException, ValueError) as error:
        raise ConnectionError(f"no answer of HTTP: {error!r}") from error
