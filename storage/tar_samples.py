"""The samples of a tar, as webdataset lays them out: consecutive members of one name.

The name ends at the first dot after the folder, the suffix follows. Nothing is left out in silence
but folders, hidden files and webdataset's own `__meta__` members.

The walk reads ustar, pax (path, size) and GNU (long names) headers itself, which is seven
times as fast as tarfile. Whatever a tar claims, at most max_sample_bytes are held at once.
"""

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO

BLOCK, CHUNK = 512, 2**20  # of a tar; of what is read at once
MAX_HEADER_BYTES = 2**20  # of one pax or long-name header
MAX_SAMPLE_BYTES = 100 * 10**6
MAX_TAR_BYTES = 2**40
ZEROS = bytes(BLOCK)
META = re.compile(rb"__[^/]*__($|/)")
# Types of members (the byte 156 of a header); others are unknown, and of no regular file.
REGULAR, WITHOUT_DATA = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")
HEADERS = (b"x", b"X", b"g", b"L", b"K")  # pax, pax for all that follow, GNU's long names
COMPRESSED: dict[bytes, Callable] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}


@dataclass
class TarSample:
    """Content of the members that were wanted (b"" of others), by lower-case suffix.

    fault: why the sample cannot be used, as `kind: detail`; "" when it can.
    """

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""


def read_tar_samples(
    stream: IO[bytes],
    wanted: Callable[[str], bool],
    max_sample_bytes: int = MAX_SAMPLE_BYTES,
    max_tar_bytes: int = MAX_TAR_BYTES,
) -> Iterator[TarSample]:
    """Yields the samples of a tar, compressed or not, in order; wanted: of a suffix, read it?

    stream: anything with read(size), which may give less than asked for; what it raises passes
    through. A tar that is cut short, corrupt or longer than max_tar_bytes ends with a sample whose
    fault says so; a sample of more than max_sample_bytes has a fault and is not held in memory.
    """
    sample, key, count, held = TarSample(""), None, 0, 0
    try:
        blocks = _Blocks(stream)
        for name, kind, size in _members(blocks, max_tar_bytes):
            folder, slash, file_name = name.rpartition(b"/")
            if kind == b"5" or file_name[:1] == b"." or META.match(name):
                continue
            stem, _, dotted = file_name.partition(b".")
            before, key = key, folder + slash + stem
            if key != before:
                if before is not None:
                    yield sample
                    count += 1
                sample, held = TarSample(_text(key)), 0
            suffix = dotted.decode("utf-8", "surrogateescape").lower()
            is_wanted, is_file = wanted(suffix), kind in REGULAR
            held += len(name) + (size if is_wanted and is_file else 0)
            if held > max_sample_bytes:
                sample.parts.clear()
                large = f"{held} bytes with {_text(name[:200])}, at most {max_sample_bytes}"
                sample.fault = sample.fault or f"sample too large: {large}"
                continue
            if suffix in sample.parts:
                sample.fault = f"duplicate member: {_text(name)}"
            elif is_wanted and not is_file:
                what = "is sparse" if kind == b"S" else "is no regular file"
                sample.fault = f"member {what}: {_text(name)}"
            sample.parts[suffix] = blocks.take(size) if is_wanted and is_file else b""
    except _Fault as fault:
        sample.fault = f"tar cut short or corrupt: after {count} samples, {fault}"
    if key is not None or sample.fault:
        yield sample


def tar_members(stream: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """(name, where its bytes begin, how many) of the regular files of a tar, without reading them.

    stream: a seekable file. Raises ValueError for a tar that is cut short or corrupt.
    """
    try:
        blocks = _Blocks(stream, seekable=True)
        for name, kind, size in _members(blocks, 2**63):
            if kind in REGULAR:
                yield _text(name), blocks.position, size
    except _Fault as fault:
        raise ValueError(f"tar cut short or corrupt: {fault}") from None


class _Fault(Exception):
    """Why the walk cannot go on."""


class _Blocks:
    """The bytes of a tar, one after the other; unpacked when the stream is compressed."""

    def __init__(self, stream: IO[bytes], seekable: bool = False):
        self._stream, self._seekable = stream, seekable
        self._packed: _Packed | None = None
        self._chunk, self._start, self._at = b"", 0, 0  # _start: the chunk's place in the tar
        while len(self._chunk) < 6 and (more := stream.read(BLOCK)):
            self._chunk += more
        for magic, unpack in COMPRESSED.items():
            if self._chunk.startswith(magic):
                self._packed = _Packed(self._chunk, stream)
                self._stream, self._chunk = unpack(self._packed), b""

    @property
    def position(self) -> int:
        return self._start + self._at

    def take(self, size: int) -> bytes:
        """The next bytes, exactly `size`. Raises _Fault at the end of the stream."""
        start = self._at
        end = start + size
        if end <= len(self._chunk):
            self._at = end
            return self._chunk[start:end]
        pieces = [self._chunk[start:]]
        missing = end - len(self._chunk)
        while missing:
            self._next_chunk()
            pieces.append(self._chunk[:missing])
            self._at = len(pieces[-1])
            missing -= self._at
        return b"".join(pieces)

    def skip_to(self, position: int) -> None:
        end = position - self._start
        if self._seekable and end > len(self._chunk):
            self._stream.seek(position - 1)  # its last byte shows whether it is there
            self._chunk, self._start, self._at = b"", position - 1, 0
            end = 1
        while end > len(self._chunk):
            self._next_chunk()
            end = position - self._start
        self._at = end

    def _next_chunk(self) -> None:
        self._start += len(self._chunk)
        self._at = 0
        try:
            self._chunk = self._stream.read(CHUNK if not self._seekable else BLOCK)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if self._packed is None or self._packed.failure:
                raise  # of the stream, not of what is packed in it
            raise _Fault(str(error)) from None
        if not self._chunk:
            raise _Fault("unexpected end of data" if self._start else "empty file")


class _Packed:
    """A compressed stream from its beginning, which is known already."""

    def __init__(self, head: bytes, stream: IO[bytes]):
        self._head, self._stream = head, stream
        self.failure: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        if self._head:
            head, self._head = self._head[:size], self._head[size:]
            return head
        try:
            return self._stream.read(size)
        except Exception as error:
            self.failure = error
            raise


def _members(blocks: _Blocks, max_bytes: int) -> Iterator[tuple[bytes, bytes, int]]:
    """(name, type, size of its data) of every member; what is not taken of the data is skipped.

    Types: those of ustar, b"5" for every folder, b"S" for every sparse file.
    """
    everywhere: dict[str, bytes] = {}  # pax records for all members that follow
    own: dict[str, bytes] = {}  # for the next one; of several headers, the first counts
    while (header := blocks.take(BLOCK)) != ZEROS:
        _check(header)
        kind, size = header[156:157], _number(header[124:136])
        if kind in HEADERS:
            records = _long_header(blocks, kind, size)
            if kind == b"g":
                everywhere |= records
            else:
                own = records | own
            continue
        name = header[:100].split(b"\0", 1)[0]
        if kind == b"S":
            is_longer = header[482]
            while is_longer:
                is_longer = blocks.take(BLOCK)[504]
        elif header[345]:
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        if kind == b"\0" and name.endswith(b"/"):
            kind = b"5"
        if records := everywhere | own:
            own = {}
            name = records.get("GNU.sparse.name", records.get("path", name)).rstrip(b"/")
            size = _decimal(records["size"]) if "size" in records else size
            if kind in REGULAR and any(record.startswith("GNU.sparse.") for record in records):
                kind = b"S"
        end = blocks.position + (0 if kind in WITHOUT_DATA else size + -size % BLOCK)
        if end > max_bytes:
            raise _Fault(f"it claims to be of more than {max_bytes} bytes")
        yield name.rstrip(b"/") if kind == b"5" else name, kind, size
        blocks.skip_to(end)


def _long_header(blocks: _Blocks, kind: bytes, size: int) -> dict[str, bytes]:
    """The pax records of a header of type x, X or g; GNU's long name as such; of a link, none."""
    if size > MAX_HEADER_BYTES:
        raise _Fault(f"a header of {size} bytes")
    content = blocks.take(size + -size % BLOCK)[:size]
    if kind == b"K":
        return {}
    return {"path": content.split(b"\0", 1)[0]} if kind == b"L" else _pax_records(content)


def _check(header: bytes) -> None:
    """Raises _Fault unless the header's sum is what it says: of unsigned, or of signed bytes."""
    said = _number(header[148:156])
    # adler32's lower half is one more than the sum of bytes, which is below 2**16 for 256 of them
    low, high = zlib.adler32(header[:256]) & 0xFFFF, zlib.adler32(header[256:]) & 0xFFFF
    if said == low + high - 2 - sum(header[148:156]) + 8 * ord(" "):
        return
    counted = header[:148] + b" " * 8 + header[156:]
    if said != sum(byte - 256 * (byte > 127) for byte in counted):
        raise _Fault("bad checksum")


def _number(digits: bytes) -> int:
    """An octal number, or GNU's binary one."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    try:
        number = int(digits.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise _Fault("invalid header")
    return number


def _pax_records(content: bytes) -> dict[str, bytes]:
    """`LENGTH KEYWORD=VALUE\\n`, one after the other."""
    records, at = {}, 0
    while at < len(content):
        length = _decimal(content[at : at + 20].split(b" ", 1)[0])
        record = content[at : at + length]
        keyword, equals, value = record.partition(b" ")[2].partition(b"=")
        if len(record) != length or not (equals and value.endswith(b"\n")):
            raise _Fault("invalid pax header")
        records[keyword.decode("utf-8", "replace")] = value[:-1]
        at += length
    return records


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise _Fault("invalid pax header")
    return int(digits)


def _text(name: bytes) -> str:
    """A name as text that can be stored: bytes that are no UTF-8 become �."""
    return name.decode("utf-8", "replace")
