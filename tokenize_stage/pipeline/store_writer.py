"""Step 4: encoded batches -> shards of the store, each committed once all its rows are in.

One thread waits for codes and makes columns of them, another writes and flushes the shard before,
so that the device waits for neither. What is in flight is bounded: AHEAD batches, two shards.
"""

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, Self

import numpy as np
import pyarrow as pa

from storage.writer import ShardWriter
from tokenize_stage.pipeline.ahead import POLL_S
from tokenize_stage.pipeline.decode_ahead import End, Step
from tokenize_stage.pipeline.encoder import Pending
from tokenize_stage.pipeline.progress import Progress
from tokenize_stage.pipeline.rows import Row
from tokenize_stage.process import Stopped
from tokenize_stage.sources.sample import InputShard, Skipped
from tokenize_stage.text.text_columns import TextColumns
from tokenize_stage.work.ledger import TaskReport, clear_failure, record_failure

AHEAD = 2  # batches on the device, beside the one whose codes are waited for
STOP_S = 10.0  # given to what is encoded already to be written, once a stop signal came


Item = tuple[list[Step], Pending | None]


class StoreWriter:
    """Takes batches in order, and makes one shard of the store of every input shard.

    Used in a `with` block. After an error of its threads, `put` and the end of the block raise it.
    """

    def __init__(
        self,
        store: Path,
        extra_columns: pa.Schema,
        text: TextColumns,
        progress: Progress,
        report: TaskReport,
    ):
        """extra_columns: of the table, those of text among them."""
        self._store, self._extra, self._text = store, extra_columns, text
        self._progress, self._report = progress, report
        self._queue: Queue[Item | None] = Queue(AHEAD)
        self._shard: ShardWriter | None = None
        self._reasons: list[str] = []  # of the shard's rejections
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._commit: Future[None] | None = None
        self._error: BaseException | None = None
        self._is_over = Event()
        self._thread = Thread(target=self._run, name="write", daemon=True)
        self._thread.start()

    def put(self, batch: list[Step], pending: Pending | None) -> None:
        """Hands over a batch and its codes (None without rows); waits while AHEAD are before it."""
        self._put((batch, pending))

    def close(self, patience_s: float | None = None) -> None:
        """Waits, patience_s at most, until what was put is written; drops shards without an end."""
        if not self._error:
            self._put(None, patience_s)
            self._thread.join(patience_s)
        self._is_over.set()
        if self._error:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; after a stop signal with little patience, after an error with none."""
        self.close(None if kind is None else STOP_S if kind is Stopped else 0.0)

    def _put(self, item: Item | None, patience_s: float | None = None) -> None:
        deadline = time.monotonic() + (math.inf if patience_s is None else patience_s)
        while not self._error and time.monotonic() < deadline:
            with suppress(Full):
                return self._queue.put(item, timeout=POLL_S)
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                self._take(*item)
            self._wait_for_commit()
        except BaseException as error:  # raised again where batches are put
            self._error = error
        self._pool.shutdown()

    def _next(self) -> Item | None:
        while not self._is_over.is_set():
            self._report.update(self._progress, self._shard.name if self._shard else "")
            with suppress(Empty):
                return self._queue.get(timeout=POLL_S)
        return None

    def _take(self, batch: list[Step], pending: Pending | None) -> None:
        with self._progress.phase("device"):
            codes = pending.result() if pending else {}
        first = 0
        with self._progress.phase("write"):
            for _, group in groupby(batch, key=lambda step: step[0].name):
                steps = list(group)
                rows = [what for _, what in steps if isinstance(what, Row)]
                span = slice(first, first + len(rows))
                self._add(steps, rows, {name: array[span] for name, array in codes.items()})
                first += len(rows)
        self._progress.add_rows(first)

    def _add(self, steps: list[Step], rows: list[Row], codes: Mapping[str, np.ndarray]) -> None:
        """What one batch has of one shard."""
        shard = steps[0][0]
        if self._shard is None:
            self._reasons = []
            self._shard = ShardWriter(self._store, shard.name, shard.source, self._extra)
        writer = self._shard
        if rows:
            text = self._text.columns([row.sample.caption for row in rows])
            writer.add({**codes, **columns(rows), **text})
        for _, what in steps:
            if isinstance(what, Skipped):
                writer.skip(what.key, what.reason)
                self._reasons.append(what.reason)
            elif isinstance(what, End):
                self._finish(writer, shard, what)
                self._shard = None

    def _finish(self, writer: ShardWriter, shard: InputShard, end: End) -> None:
        """Commits a shard behind the back of the next one, or notes that it failed."""
        if end.failure is not None:
            record_failure(self._store, shard.name, end.failure)
            self._progress.shard_failed(shard.name, end.failure)
            return
        self._wait_for_commit()
        self._commit = self._pool.submit(self._commit_shard, writer, self._reasons)

    def _commit_shard(self, writer: ShardWriter, reasons: list[str]) -> None:
        writer.commit()
        clear_failure(self._store, writer.name)
        for reason in reasons:
            self._progress.add_skipped(reason)
        self._progress.shard_done(writer.rows)

    def _wait_for_commit(self) -> None:
        if self._commit:
            self._commit.result()


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """The table's columns of rows, as ShardWriter takes them, but for those of text."""
    samples, pictures = [row.sample for row in rows], [row.picture for row in rows]
    return {
        "key": [sample.key for sample in samples],
        "class_id": [sample.class_id for sample in samples],
        "caption": [sample.caption for sample in samples],
        "original_height": [picture.original_height for picture in pictures],
        "original_width": [picture.original_width for picture in pictures],
        "crop_top": [picture.crop_top for picture in pictures],
        "crop_left": [picture.crop_left for picture in pictures],
        "crop_height": [picture.crop_height for picture in pictures],
        "crop_width": [picture.crop_width for picture in pictures],
        "view": [picture.view for picture in pictures],
        "flipped": [picture.flipped for picture in pictures],
        "image_hash": [row.image_hash for row in rows],
        **{name: [row.columns[name] for row in rows] for name in rows[0].columns},
    }
