"""Reads the samples of an input shard, one after the other, and again where reading fails."""

import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from threading import Event

from storage.patience import http_status, refusal
from tokenize_stage.process import Stopped
from tokenize_stage.sources.config import DatasetConfig
from tokenize_stage.sources.image_folder import read_folder
from tokenize_stage.sources.sample import InputShard, Sample, Skipped
from tokenize_stage.sources.table_rows import read_table
from tokenize_stage.sources.tars import read_tar
from tokenize_stage.sources.watch import ReadPatience, Watch, read_watched

MAX_OUTCOMES = 2**21  # of one shard: their keys are kept until it ends
MAX_KEY, MAX_REASON = 1024, 1000  # characters


class SourceFailed(OSError):
    """An input shard cannot be read; the message names it and the last reason."""


def read_patience(dataset: DatasetConfig) -> ReadPatience:
    """What dataset.* says of reading."""
    return ReadPatience(
        timeout_s=dataset.read_timeout_s,
        attempts=dataset.read_attempts,
        max_sample_bytes=dataset.max_sample_bytes,
        max_shard_bytes=dataset.max_shard_bytes,
    )


def read_samples(
    shard: InputShard, patience: ReadPatience | None = None, stop: Event | None = None
) -> Iterator[Sample | Skipped]:
    """Yields the samples of a shard in order, and a Skipped for whatever is none.

    A tar that is cut short or corrupt ends with a Skipped that says where. What fails in a way that
    may pass is read again from its start, without giving a sample twice. Raises FileNotFoundError
    or PermissionError at once, SourceFailed when patience ends, and Stopped soon after `stop`.
    """
    patience, stop, given = patience or ReadPatience(), stop or Event(), _Given()
    for attempt in range(1, patience.attempts + 1):
        try:
            read = partial(_read, shard, patience)
            yield from given.drop(read_watched(read, patience.timeout_s, stop), shard)
            return
        except (Stopped, SourceFailed):
            raise
        except Exception as error:
            refused = refusal(shard.source, _answer(error))
            if refused and not isinstance(refused, ValueError):
                raise refused from error
            if refused or attempt == patience.attempts:
                times = f"{attempt} attempts failed, the last with " if attempt > 1 else ""
                reason = f"{times}{type(error).__name__}: {error}"
                raise SourceFailed(f"{shard.source} cannot be read: {reason}") from error
        if stop.wait(patience.pause_s * 4 ** (attempt - 1)):
            raise Stopped


def _answer(error: Exception) -> Exception:
    """What a web server answered: fsspec calls whatever that is a file that does not exist."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and http_status(cause):
        return cause
    return error


class _Given:
    """What was given of a shard, over all attempts: how many, and a sum of their keys."""

    def __init__(self) -> None:
        self._count = self._sum = 0

    def drop(
        self, outcomes: Iterator[Sample | Skipped], shard: InputShard
    ) -> Iterator[Sample | Skipped]:
        """The outcomes of a new attempt that were not given yet."""
        count = sum_of_keys = 0
        for outcome in outcomes:
            count += 1
            sum_of_keys = zlib.crc32(outcome.key.encode(), sum_of_keys)
            if count > self._count:
                self._count, self._sum = count, sum_of_keys
                yield outcome
            elif count == self._count and sum_of_keys != self._sum:
                break
        if count < self._count or sum_of_keys != self._sum:
            raise SourceFailed(f"{shard.source} has changed while it was read; run it again")


def _read(
    shard: InputShard, patience: ReadPatience, watch: Watch
) -> Generator[Sample | Skipped, None, None]:
    """The outcomes of one attempt; of samples with one key, the first."""
    if shard.files is not None:
        outcomes = read_folder(shard, watch, patience.max_sample_bytes)
    elif shard.table is not None:
        outcomes = read_table(shard, watch, patience)
    else:
        outcomes = read_tar(shard, watch, patience)
    keys: set[str] = set()
    with closing(outcomes):
        for number, outcome in enumerate(outcomes):
            if number == MAX_OUTCOMES:
                reason = f"shard too large: nothing after {number} samples is read"
                yield Skipped(outcome.key[:MAX_KEY], shard.source, reason)
                return
            reason = outcome.reason if isinstance(outcome, Skipped) else ""
            if len(outcome.key) > MAX_KEY:
                reason = reason or f"key too long: {len(outcome.key)} characters"
            elif outcome.key in keys:
                reason = reason or "duplicate key: a sample before it in this shard has the same"
            if reason:
                yield Skipped(outcome.key[:MAX_KEY], outcome.source, reason[:MAX_REASON])
                continue
            yield outcome
            keys.add(outcome.key)
