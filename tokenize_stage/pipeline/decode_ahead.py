"""Steps 1 and 2 ahead of the encoder: one thread reads, a pool decodes, the order stays.

What is read but not yet encoded is bounded: 4 samples a decoding thread plus the queue.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

from tokenize_stage.pixels.decode import BadImage, Picture, decode_image
from tokenize_stage.process import Stopped
from tokenize_stage.sources.input_shards import InputShard
from tokenize_stage.sources.read import read_samples
from tokenize_stage.sources.sample import Sample, Skipped

T = TypeVar("T")
POLL_S = 0.1  # between two looks at whether to stop
JOIN_S = 2  # given to a reading thread to end; a stalled read may never


@dataclass(frozen=True)
class Decoded:
    """A sample and its picture, ready to be encoded."""

    sample: Sample
    picture: Picture


Outcome = Decoded | Skipped | None
"""What became of the next sample; None closes every shard, an empty one too."""


def decode_ahead(
    shards: Iterable[InputShard], resolution: int, threads: int, queue_size: int, stop: Event
) -> Generator[Outcome, None, None]:
    """Yields the outcomes of all shards in order, while later ones are read and decoded.

    Close the generator to stop early. Raises what reading an input raises, in its turn, and
    Stopped once `stop` is set, also where the next outcome does not come.
    """
    return _in_thread(_decode(shards, resolution, threads), queue_size, stop)


def _decode(
    shards: Iterable[InputShard], resolution: int, threads: int
) -> Generator[Outcome, None, None]:
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        pending: deque[Future[Outcome]] = deque()
        for future in _submit(shards, resolution, pool):
            pending.append(future)
            if len(pending) > 4 * threads:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def _submit(
    shards: Iterable[InputShard], resolution: int, pool: ThreadPoolExecutor
) -> Iterator[Future[Outcome]]:
    for shard in shards:
        try:
            for sample in read_samples(shard):
                yield pool.submit(_decode_one, sample, resolution)
            yield pool.submit(lambda: None)
        except Exception as error:  # takes its turn: what was read before is still encoded
            failed: Future[Outcome] = Future()
            failed.set_exception(error)
            yield failed
            return


def _decode_one(sample: Sample | Skipped, resolution: int) -> Decoded | Skipped:
    if isinstance(sample, Skipped):
        return sample
    try:
        return Decoded(sample, decode_image(sample.data, resolution))
    except BadImage as error:
        return Skipped(sample.key, sample.source, f"bad image: {error}")


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


def _in_thread(
    items: Generator[T, None, None], queue_size: int, stop: Event
) -> Generator[T, None, None]:
    """Runs a generator in a thread of its own, at most queue_size items ahead."""
    queue: Queue[T | _End] = Queue(queue_size)
    closed = Event()

    def put(item: T | _End) -> None:
        while not closed.is_set():
            with suppress(Full):
                return queue.put(item, timeout=POLL_S)

    def fill() -> None:
        try:
            with closing(items):
                for item in items:
                    put(item)
                    if closed.is_set():
                        return
            put(_End())
        except BaseException as error:  # raised again where the items are used
            put(_End(error))

    thread = Thread(target=fill, name="read", daemon=True)
    thread.start()
    try:
        while not stop.is_set():
            try:
                item = queue.get(timeout=POLL_S)
            except Empty:
                continue
            if not isinstance(item, _End):
                yield item
            elif item.error is None:
                return
            elif not stop.is_set():  # else Ctrl-C has ended a `pipe:` command, too
                raise item.error
        raise Stopped
    finally:
        closed.set()
        thread.join(JOIN_S)
