"""The rows of a part of a table as samples.

A class of -1 is none, as in the `datasets` library. Columns that are no part of a sample are its
metadata, when they are numbers, truth values or text; so is the path or URL of an image.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tokenize_stage.sources.csv_rows import csv_rows
from tokenize_stage.sources.row_image import NoImage, image_bytes
from tokenize_stage.sources.sample import (
    InputShard,
    Sample,
    Skipped,
    TablePart,
    checked_caption,
    checked_class_id,
    stored_key,
    suffix_of,
)
from tokenize_stage.sources.stream import open_arrow, open_file
from tokenize_stage.sources.watch import ReadPatience, Watch, map_ahead

BATCH_BYTES, BATCH_ROWS = 8 * 2**20, 256  # decoded at once
FETCHES = 8  # images behind paths and URLs that are read at once
SCALAR = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_boolean,
    pa.types.is_string,
    pa.types.is_large_string,
)

Values = Mapping[str, Any]
"""One row by column. An image that is no text is a pyarrow scalar, which is not copied yet."""


def read_table(
    shard: InputShard, watch: Watch, patience: ReadPatience
) -> Generator[Sample | Skipped, None, None]:
    """The rows of a shard. Raises OSError or ValueError when the table cannot be read, or has not
    the rows that it had when it was listed.
    """
    part = shard.table
    assert part is not None
    if not part.count:
        yield Skipped("", shard.source, "empty table: it has no rows")
        return
    read: Callable[[TablePart], Iterator[Values | None]]
    read = csv_rows if suffix_of(part.path) in ("csv", "tsv") else _arrow_rows
    to_outcome = partial(_to_outcome, part, shard.source, watch, patience)
    count = 0
    for outcome in map_ahead(
        to_outcome, enumerate(_signed(read(part), watch), part.first), FETCHES
    ):
        count += 1
        yield outcome
    if count != part.count:
        raise ValueError(f"{count} rows where there were {part.count}; make a new plan")


def _signed(rows: Iterator[Values | None], watch: Watch) -> Iterator[Values | None]:
    for row in rows:
        watch.sign()
        yield row


def _arrow_rows(part: TablePart) -> Iterator[Values]:
    """The rows part.first to part.first + part.count of an Arrow or Parquet file."""
    first, last = part.first, part.first + part.count
    name = part.columns["image"]
    batches = _arrow_batches if suffix_of(part.path) == "arrow" else _parquet_batches
    for start, batch in batches(part):
        batch = batch.slice(max(first - start, 0), last - max(first, start))
        images = batch[name]
        if _is_text(images):
            yield from _to_python(batch)
            continue
        for values, image in zip(_to_python(batch.drop_columns([name])), images, strict=True):
            yield {**values, name: image}


def _is_text(column: pa.Array) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _to_python(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # of one text; the others shall not suffer
        columns = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            values = column.cast(pa.large_binary()) if _is_text(column) else column
            columns[name] = [
                value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
                for value in values.to_pylist()
            ]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _parquet_batches(part: TablePart) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of its first row, batch) of the row groups in which the part lies."""
    end = part.first + part.count
    with open_file(part.path) as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
        names = [field.name for field in file.schema_arrow if _is_wanted(field, part)]
        start = 0
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            if part.first < start + group.num_rows and start < end:
                rows = _batch_rows(group.total_byte_size, group.num_rows)
                row = start
                for batch in file.iter_batches(rows, [index], names, use_threads=False):
                    if part.first < row + batch.num_rows and row < end:
                        yield row, batch
                    row += batch.num_rows
            start += group.num_rows


def _arrow_batches(part: TablePart) -> Iterator[tuple[int, pa.RecordBatch]]:
    start, end = 0, part.first + part.count
    with open_arrow(part.path) as reader:
        names = [field.name for field in reader.schema if _is_wanted(field, part)]
        for batch in reader:
            if part.first < start + batch.num_rows and start < end:
                rows = _batch_rows(batch.nbytes, batch.num_rows)
                for row in range(0, batch.num_rows, rows):
                    if part.first < start + row + rows and start + row < end:
                        yield start + row, batch.select(names).slice(row, rows)
            start += batch.num_rows


def _batch_rows(size: int, rows: int) -> int:
    return min(max(BATCH_BYTES * rows // max(size, 1), 1), BATCH_ROWS)


def _is_wanted(field: pa.Field, part: TablePart) -> bool:
    """Of the columns beside those that a sample is made of, the scalar ones are metadata."""
    return field.name in part.columns.values() or any(test(field.type) for test in SCALAR)


def _to_outcome(
    part: TablePart,
    source: str,
    watch: Watch,
    patience: ReadPatience,
    row: tuple[int, Values | None],
) -> Sample | Skipped:
    number, values = row
    key = f"{number:09d}"
    if values is None:
        return Skipped(key, source, "ragged row: it has not as many fields as the header")
    columns = part.columns
    if "key" in columns:
        if values[columns["key"]] is None:
            return Skipped(key, source, f"no key: {columns['key']} is null")
        key = stored_key(str(values[columns["key"]]))
    reading = "caption"
    try:
        caption = checked_caption(values[columns["caption"]]) if "caption" in columns else None
        reading = "class"
        class_id = _class_id(values.get(columns.get("class_id", "")), part.label_ids)
    except ValueError as error:
        return Skipped(key, source, f"unreadable {reading}: {error}")
    try:
        data = image_bytes(values[columns["image"]], part.path, watch, patience)
    except NoImage as error:
        return Skipped(key, source, str(error))
    metadata = {
        name: stored_key(value) if isinstance(value, str) else value
        for name, value in values.items()
        if name not in columns.values() or (name == columns["image"] and isinstance(value, str))
    }
    return Sample(key, data, class_id, caption, source, metadata)


def _class_id(label: Any, label_ids: Mapping[str, int]) -> int | None:
    """None for no label. Raises ValueError for one that is no number and no known name."""
    if label is None or label == "" or label == -1 or label != label:
        return None
    if isinstance(label, str) and label in label_ids:
        return label_ids[label]
    try:
        number = int(label)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{label!r:.50} is no number, nor in dataset.class_index") from None
    if isinstance(label, float) and number != label:
        raise ValueError(f"{label} is no whole number")
    return checked_class_id(number)
