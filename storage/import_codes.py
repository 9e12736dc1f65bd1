"""Codes that other projects computed -> a store; nothing is encoded again.

    tokenizer = imported_tokenizer("openMUSE/vqgan-f16-8192-laion", 8192, [16, 16])
    parts = webdataset_parts(["laion/00000.tar", "laion/00001.tar"])
    import_parts(Path("store"), imported_meta(256, tokenizer), parts)

Every part of the input becomes one shard of the store, named by it, whole or not at all: the same
call goes on where it was interrupted. What cannot be a row is listed in the store with a reason.
storage/foreign_codes.py reads the formats.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage.fingerprint import fingerprint
from storage.foreign_codes import InputPart, Outcome, Rejected, view_number
from storage.progress import Progress, no_progress
from storage.rewrite import remove_stale
from storage.schema import ArrayColumn, Backend, StoreMeta, Tokenizer, codes_dtype
from storage.seal import seal
from storage.writer import (
    ShardWriter,
    create_store,
    expect_shards,
    expected_shards,
    finished_shards,
)

ROWS_AT_ONCE = 1024
UNFIT = (pa.ArrowException, ValueError, TypeError, OverflowError)  # of a label for its column


@dataclass
class ImportSummary:
    """How many parts there are and were finished before; rows written and samples rejected now."""

    parts: int
    finished_before: int
    rows: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class _Row:
    key: str
    codes: dict[str, np.ndarray]  # (N,) by array column
    labels: dict[str, Any]


def imported_tokenizer(
    name: str,
    codebook_size: int,
    grid: list[int],
    model_fingerprint: str | None = None,
    class_name: str = "imported",
) -> Tokenizer:
    """Which model made the codes: the files do not say, so the user does.

    model_fingerprint: storage.pretrained.model_fingerprint of the model directory `name`, where
    it is at hand; else sha256 of ["imported", name] stands for a model known by name only.
    """
    digest = model_fingerprint or fingerprint(["imported", name])
    return Tokenizer(name, class_name, codebook_size, grid, digest)


def imported_meta(
    resolution: int,
    tokenizer: Tokenizer,
    backend: Backend = "zarr",
    transform: dict[str, Any] | None = None,
) -> StoreMeta:
    """Of a store with one column, `codes`; transform: how pixels were made, None: not known."""
    width = int(np.prod(tokenizer.grid))
    arrays = {"codes": ArrayColumn(codes_dtype(tokenizer.codebook_size), [width])}
    return StoreMeta(resolution, arrays, {"codes": tokenizer}, transform or {}, backend)


def import_parts(
    store: Path,
    meta: StoreMeta,
    parts: Sequence[InputPart],
    workers: int = 1,
    progress: Progress = no_progress,
    dry_run: bool = False,
) -> ImportSummary:
    """Makes the store, or goes on with it, and seals it when it is whole.

    workers: processes, each at one part. Raises ValueError when two parts have one name, a shard
    of a part's name was made from something else, a file is not what it should be, or no sample
    of a part gives a row.
    """
    todo = _unfinished(store, parts)
    summary = ImportSummary(len(parts), len(parts) - len(todo))
    if dry_run:
        return summary
    create_store(store, meta)
    expect_shards(store, [part.name for part in parts])
    write = partial(import_part, store)
    with ExitStack() as stack:
        results: Iterator[tuple[int, int]] = map(write, todo)
        if workers > 1:
            pool = ProcessPoolExecutor(workers, get_context("spawn"))
            results = stack.enter_context(pool).map(write, todo)
        for rows, rejected in progress(results, len(todo)):
            summary.rows, summary.rejected = summary.rows + rows, summary.rejected + rejected
    if expected_shards(store) <= finished_shards(store).keys():
        seal(store)
    remove_stale(store)
    return summary


def import_part(store: Path, part: InputPart) -> tuple[int, int]:
    """Writes one shard; returns how many rows it has and how many samples were rejected."""
    with ShardWriter(store, part.name, part.source, part.extra_columns) as writer:
        rows = _rows(part.read(list(writer.meta.arrays)), writer.meta, part.source)
        rejected: list[Rejected] = []
        while some := list(islice(rows, ROWS_AT_ONCE)):
            rejected += [row for row in some if isinstance(row, Rejected)]
            rejected += _add(writer, [row for row in some if isinstance(row, _Row)])
        if rejected and not writer.rows:
            raise ValueError(
                f"{part.source}: all of its {len(rejected)} samples are rejected, the first, "
                f"{rejected[0].key!r}, for {rejected[0].reason}"
            )
        for sample in rejected:
            writer.skip(sample.key, sample.reason)
    return writer.rows, writer.skipped


def _unfinished(store: Path, parts: Sequence[InputPart]) -> list[InputPart]:
    counts = Counter(part.name for part in parts)
    if counts and counts.most_common(1)[0][1] > 1:
        name = counts.most_common(1)[0][0]
        raise ValueError(f"several parts would become the shard {name!r}: rename their files")
    finished = finished_shards(store)
    for part in parts:
        made_from = finished.get(part.name, {}).get("source", part.source)
        if made_from != part.source:
            raise ValueError(
                f"shard {part.name} of {store} was made from {made_from}, not {part.source}: "
                "give the same input and sizes as before, or choose another store"
            )
    return [part for part in parts if part.name not in finished]


def _rows(outcomes: Iterator[Outcome], meta: StoreMeta, source: str) -> Iterator[_Row | Rejected]:
    """The views of every sample one by one; a sample of a wrong shape is rejected."""
    for sample in outcomes:
        if isinstance(sample, Rejected):
            yield sample
            continue
        try:
            codes = {name: _views(sample.codes[name], meta, name) for name in meta.arrays}
            views = len(next(iter(codes.values())))
            if any(len(found) != views for found in codes.values()):
                raise ValueError(
                    "unequal views: " + ", ".join(f"{n} {len(codes[n])}" for n in codes)
                )
        except ValueError as error:
            yield Rejected(sample.key, str(error))
            continue
        labels = {"source": source, **sample.labels, "key": sample.key}
        if isinstance(labels.get("class_id"), int) and labels["class_id"] < 0:
            yield Rejected(sample.key, f"negative class: {labels['class_id']}")
            continue
        for place in range(views):
            if views > 1:
                labels = labels | {"view": view_number(place, views)}
            yield _Row(sample.key, {name: found[place] for name, found in codes.items()}, labels)


def _views(found: np.ndarray, meta: StoreMeta, column: str) -> np.ndarray:
    """(views, N), from an array with as many numbers."""
    shape = meta.arrays[column].shape
    if column in meta.tokenizers and found.dtype.kind not in "iu":
        raise ValueError(f"no integers: {column} is {found.dtype}")
    if not found.size or found.size % int(np.prod(shape)):
        raise ValueError(f"wrong size: {column} is {list(found.shape)}, a row {shape}")
    return found.reshape(-1, *shape)


def _add(writer: ShardWriter, rows: list[_Row]) -> list[Rejected]:
    """Appends the rows that the store can hold; returns the others."""
    table, rows, rejected = _label_table(rows, writer.schema)
    if not rows:
        return rejected
    arrays = {name: np.stack([row.codes[name] for row in rows]) for name in writer.meta.arrays}
    good = np.ones(len(rows), bool)
    for name, tokenizer in writer.meta.tokenizers.items():
        codes, size = arrays[name].reshape(len(rows), -1), tokenizer.codebook_size
        inside = (codes.min(axis=1) >= 0) & (codes.max(axis=1) < size)
        for place in np.flatnonzero(good & ~inside):
            found = f"{codes[place].min()}..{codes[place].max()}"
            reason = f"code out of range: {found}, the codebook has [0, {size})"
            rejected.append(Rejected(rows[place].key, reason))
        good &= inside
    writer.add_table({name: array[good] for name, array in arrays.items()}, table.filter(good))
    return rejected


def _label_table(
    rows: list[_Row], schema: pa.Schema
) -> tuple[pa.Table, list[_Row], list[Rejected]]:
    """The labels that have columns, the rows whose labels fit them, and the others."""
    fitting: list[_Row] = []
    rejected: list[Rejected] = []
    try:
        return pa.Table.from_pylist([row.labels for row in rows], schema), rows, rejected
    except UNFIT:
        for row in rows:
            try:
                pa.Table.from_pylist([row.labels], schema)
                fitting.append(row)
            except UNFIT as error:
                rejected.append(Rejected(row.key, f"unfit label: {error}"))
    return pa.Table.from_pylist([row.labels for row in fitting], schema), fitting, rejected
