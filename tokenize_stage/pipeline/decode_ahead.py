"""Steps 1 and 2 ahead of the encoder: one thread reads, a pool decodes, the order stays.

What is read but not yet encoded is bounded in number, and in bytes while it is undecoded. The next
input shard is opened while one is read, so that its first byte is not waited for.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from threading import Condition, Event, Thread

from tokenize_stage.pipeline.ahead import run_ahead
from tokenize_stage.pipeline.rows import Outcome, Prepare, Row
from tokenize_stage.process import Stopped
from tokenize_stage.sources.sample import InputShard, Sample, Skipped

UNDECODED_BYTES = 256 * 2**20
IDLE_S = 2.0  # without a next sample: what is ready is encoded, however little
Read = Callable[[InputShard], Iterator[Sample | Skipped]]


@dataclass(frozen=True)
class End:
    """What follows the last sample of every input shard; failure: why it cannot be read."""

    failure: str | None = None


Step = tuple[InputShard, Row | Skipped | End]


def decode_ahead(
    shards: Iterable[InputShard],
    read: Read,
    prepare: Callable[[InputShard], Prepare],
    threads: int,
    ahead: int,
    stop: Event,
) -> Generator[Step | None, None, None]:
    """Yields the rows of all shards in order, while later ones are read and decoded.

    prepare: of a shard, its function from a sample to rows. ahead: samples held at most, beside
    four for each thread. None comes after IDLE_S without a next step. Close the generator to stop
    early. Raises what a thread raises, in its turn, and Stopped once `stop` is set.
    """
    submitted = _submit(shards, read, prepare, threads, stop)
    with closing(run_ahead(submitted, 4 * threads + ahead, stop, IDLE_S)) as steps:
        for step in steps:
            if step is None:
                yield None
                continue
            shard, future = step
            outcome = future.result()
            for one in outcome if isinstance(outcome, list) else [outcome]:
                yield shard, one


def _submit(
    shards: Iterable[InputShard],
    read: Read,
    prepare: Callable[[InputShard], Prepare],
    threads: int,
    stop: Event,
) -> Generator[tuple[InputShard, Future[Outcome | End]], None, None]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    undecoded = _Undecoded()
    try:
        for shard, samples in _opened_ahead(shards, read):
            failure = None
            try:
                work = undecoded.forgotten_after(prepare(shard))
                for sample in samples:
                    if isinstance(sample, Skipped):
                        yield shard, _done(sample)
                    else:
                        undecoded.add(sample)
                        yield shard, pool.submit(work, sample)
            except (OSError, ValueError) as error:
                failure = str(error) or repr(error)
            if stop.is_set():  # a source that is told to stop may end without having ended
                raise Stopped
            yield shard, _done(End(failure))
    except GeneratorExit:  # nobody waits for the pictures any more
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown()


class _Undecoded:
    """Counts the bytes of the samples that wait to be decoded, and holds up who reads too many."""

    def __init__(self) -> None:
        self._bytes, self._fewer = 0, Condition()

    def add(self, sample: Sample) -> None:
        size = len(sample.data)
        with self._fewer:
            self._fewer.wait_for(lambda: not self._bytes or self._bytes + size <= UNDECODED_BYTES)
            self._bytes += size

    def forgotten_after(self, prepare: Prepare) -> Prepare:
        def work(sample: Sample) -> Outcome:
            try:
                return prepare(sample)
            finally:
                with self._fewer:
                    self._bytes -= len(sample.data)
                    self._fewer.notify()

        return work


def _opened_ahead(
    shards: Iterable[InputShard], read: Read
) -> Iterator[tuple[InputShard, Iterator[Sample | Skipped]]]:
    """Every shard and its samples, the first of them read while the shard before is used."""
    opened: deque[tuple[InputShard, Iterator[Sample | Skipped]]] = deque()
    for shard in shards:
        opened.append((shard, _open(read, shard)))
        if len(opened) > 1:
            yield opened.popleft()
    yield from opened


def _open(read: Read, shard: InputShard) -> Iterator[Sample | Skipped]:
    samples = read(shard)
    first: Future[list[Sample | Skipped]] = Future()

    def begin() -> None:
        try:
            first.set_result([next(samples)])
        except StopIteration:
            first.set_result([])
        except BaseException as error:  # raised again where the samples are used
            first.set_exception(error)

    Thread(target=begin, name="open", daemon=True).start()

    def all_samples() -> Iterator[Sample | Skipped]:
        yield from first.result()
        yield from samples

    return all_samples()


def _done(outcome: Skipped | End) -> Future[Outcome | End]:
    future: Future[Outcome | End] = Future()
    future.set_result(outcome)
    return future
