"""The samples of a tar, as webdataset lays them out: consecutive members of one name.

The name ends at the first dot after the folder, the suffix follows. Nothing is left out in silence
but folders, hidden files and webdataset's own `__meta__` members.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO

HIDDEN = re.compile(r"(.*/)?\.[^/]*$|__[^/]*__($|/)")


@dataclass
class TarSample:
    """Content of the members that were wanted (b"" of others), by lower-case suffix.

    fault: why the sample cannot be used, as `kind: detail`; "" when it can.
    """

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""


def read_tar_samples(stream: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[TarSample]:
    """Yields the samples of a tar, compressed or not, in order; wanted: of a suffix, read it?

    A tar that is cut short or corrupt ends with a sample whose fault says so.
    """
    sample, count = TarSample(""), 0
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
                folder, slash, name = member.name.rpartition("/")
                if member.isdir() or HIDDEN.match(member.name):
                    continue
                stem, _, suffix = name.partition(".")
                key = text(f"{folder}{slash}{stem}")
                if key != sample.key:
                    if sample.parts:
                        yield sample
                        count += 1
                    sample = TarSample(key)
                _read_member(tar, member, suffix.lower(), wanted, sample)
    except (tarfile.TarError, EOFError) as error:
        sample.fault = f"tar cut short or corrupt: after {count} samples, {error}"
        yield sample
    else:
        if sample.parts:
            yield sample


def text(name: str) -> str:
    """A file name as text that can be stored: bytes that are no UTF-8 become �."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_member(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    suffix: str,
    wanted: Callable[[str], bool],
    sample: TarSample,
) -> None:
    if suffix in sample.parts:
        sample.fault = f"duplicate member: {text(member.name)}"
    elif wanted(suffix) and not member.isreg():
        sample.fault = f"member is no regular file: {text(member.name)}"
    file = tar.extractfile(member) if wanted(suffix) and member.isreg() else None
    sample.parts[suffix] = file.read() if file else b""


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of the archive; here it is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictTarInfo":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the block of zeros at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
