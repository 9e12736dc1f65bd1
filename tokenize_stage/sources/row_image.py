"""The image of a table's row: bytes in the table, or what its path or URL leads to.

A path is relative to the table's folder. A URL must be of http(s) or of the table's own protocol;
a table never runs a command. What cannot be had is one row skipped, unless the disk fails.
"""

import os
from typing import Any

import pyarrow as pa

from storage.patience import refusal
from tokenize_stage.sources.image_folder import OF_THE_FILE, read_regular_file
from tokenize_stage.sources.stream import URL, read_whole
from tokenize_stage.sources.watch import ReadPatience, Watch


class NoImage(Exception):
    """Why a row has none, as `kind: detail`."""


def image_bytes(value: Any, table: str, watch: Watch, patience: ReadPatience) -> bytes:
    """value: binary, text, or {bytes, path}, as a pyarrow scalar; or text. Raises NoImage."""
    if isinstance(value, pa.StructScalar):
        fields = dict(value.items())
        has_bytes = "bytes" in fields and fields["bytes"].is_valid
        value = fields["bytes"] if has_bytes else fields.get("path")
    if isinstance(value, pa.BinaryScalar) and not isinstance(value, pa.StringScalar):
        return _checked(value.as_buffer(), patience.max_sample_bytes)
    path = value.as_py() if isinstance(value, pa.Scalar) else value
    if not path or not isinstance(path, str):
        raise NoImage(f"no image: the row has {path!r:.50}, neither bytes nor a path")
    return _fetch(_resolve(path, table), table, watch, patience)


def _checked(content: pa.Buffer | None, max_bytes: int) -> bytes:
    if content is None:
        raise NoImage("no image: the row has null")
    if content.size > max_bytes:
        raise NoImage(f"sample too large: {content.size} bytes, at most {max_bytes}")
    return content.to_pybytes()


def _resolve(path: str, table: str) -> str:
    """The path or URL of an image. Raises NoImage for one that a table may not name."""
    folder = table.rpartition("/")[0]
    if URL.match(path):
        if path.partition("://")[0] in ("http", "https", table.partition("://")[0]):
            return path
        raise NoImage(f"refused URL: {path:.100} is not of http, https or the table's protocol")
    if not URL.match(table):
        return os.path.join(folder, path)
    if path.startswith("/"):
        raise NoImage(f"refused path: {path:.100} is not below the table's URL")
    return f"{folder}/{path}"


def _fetch(place: str, table: str, watch: Watch, patience: ReadPatience) -> bytes:
    try:
        if URL.match(place):
            return _download(place, watch, patience)
        return read_regular_file(place, watch, patience.max_sample_bytes)
    except ValueError as error:
        raise NoImage(str(error)) from None
    except OSError as error:
        if error.errno not in OF_THE_FILE or not os.path.exists(table):
            raise
        raise NoImage(f"unreadable file: {error.strerror}") from None


def _download(url: str, watch: Watch, patience: ReadPatience) -> bytes:
    """Raises NoImage when every attempt failed: links die, and no other row shall suffer."""
    limit = patience.max_sample_bytes
    for attempt in range(patience.attempts):
        if attempt:
            watch.given_up.wait(patience.pause_s * 4 ** (attempt - 1))
        watch.sign()
        try:
            data = read_whole(url, watch, patience.timeout_s / 2, limit)
            break
        except Exception as error:
            refused = refusal(url, error)
            if refused or attempt == patience.attempts - 1:
                raise NoImage(f"unreadable URL: {refused or repr(error)}") from None
    if len(data) > limit:
        raise NoImage(f"sample too large: {url:.200} has more than {limit} bytes")
    return data
