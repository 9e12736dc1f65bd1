"""CSV and TSV, with a header line, UTF-8; read by byte offsets, so that shards begin at once.

Fields of TSV are as they stand: a quotation mark means nothing there. Blank lines are no rows.
"""

import csv
import io
from collections.abc import Iterator
from itertools import islice
from typing import IO, cast

from tokenize_stage.sources.sample import TablePart, suffix_of
from tokenize_stage.sources.stream import open_file

MAX_LINE_BYTES = 2**20


class _Lines:
    """The lines of a file as text, and where the next one begins."""

    def __init__(self, file: IO[bytes], offset: int = 0):
        self._file, self.offset = file, offset
        file.seek(offset)

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes at {self.offset}")
            self.offset += len(line)
            yield line.decode("utf-8", "surrogateescape")


def csv_pieces(path: str, rows_per_shard: int) -> tuple[list[str], list[tuple[int, int, int]]]:
    """The columns, and (first row, rows, byte offset) of every shard; reads the file once.

    Raises ValueError, with the row, for what is no CSV.
    """
    with _open(path) as file:
        lines = _Lines(file)
        rows = _rows(path, lines)
        header = _header(path, rows)
        pieces, first, offset = [], 0, lines.offset
        while count := sum(1 for _ in islice(rows, rows_per_shard)):
            pieces.append((first, count, offset))
            first, offset = first + count, lines.offset
    return header, pieces or [(0, 0, offset)]


def csv_rows(part: TablePart) -> Iterator[dict[str, str] | None]:
    """The rows of a part by column; None for a row that has not as many fields as the header."""
    with _open(part.path) as file:
        header = _header(part.path, _rows(part.path, _Lines(file)))
        rows = _rows(part.path, _Lines(file, part.offset))
        for row in islice(rows, part.count):
            yield dict(zip(header, row, strict=True)) if len(row) == len(header) else None


def _open(path: str) -> IO[bytes]:
    return cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, open_file(path)), 2**20))


def _rows(path: str, lines: _Lines) -> Iterator[list[str]]:
    if suffix_of(path) == "tsv":
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(lines)
    try:
        yield from filter(None, rows)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from None


def _header(path: str, rows: Iterator[list[str]]) -> list[str]:
    header = [name.removeprefix("\ufeff") for name in next(rows, [])]
    if len({*header}) < len(header) or not header:
        raise ValueError(f"{path}: the first line must name the columns, it is {header}")
    return header
