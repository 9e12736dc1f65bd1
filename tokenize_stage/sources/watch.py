"""Reading in a thread of its own, so that a source that gives no more byte can be given up.

A thread that hangs in the system (a dead network file system) cannot be ended; it is left behind.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Condition, Event, Thread
from typing import Any, TypeVar

from tokenize_stage.process import Stopped
from tokenize_stage.sources.sample import Sample, Skipped

T = TypeVar("T")
R = TypeVar("R")
Outcome = Sample | Skipped
POLL_S = 0.01  # between two looks at whether there is anything, or to stop
WAKE_ITEMS, WAKE_BYTES = 64, 2**20
BELT_ITEMS, BELT_BYTES = 256, 8 * 2**20  # read ahead at most, but for the last sample


@dataclass(frozen=True)
class ReadPatience:
    """How long a source is waited for, how often it is read, and how much of it at most.

    The pauses between attempts are pause_s, four times that, and so on.
    """

    timeout_s: float = 120.0  # without a byte
    attempts: int = 3
    pause_s: float = 5.0
    max_sample_bytes: int = 100_000_000
    max_shard_bytes: int = 2**40


@dataclass
class Watch:
    """What a reading thread and the one that waits for it tell each other."""

    last_sign: float = field(default_factory=time.monotonic)
    given_up: Event = field(default_factory=Event)
    close: list[Callable[[], Any]] = field(default_factory=list)  # what makes a blocked read end

    def sign(self) -> None:
        """A byte has come."""
        self.last_sign = time.monotonic()


class _Belt:
    """Outcomes on their way from one thread to another, all that lie on it taken at once."""

    def __init__(self, watch: Watch):
        self._watch = watch
        self._changed = Condition()
        self._outcomes: list[Outcome] = []
        self._held = 0
        self._is_over = False
        self._error: Exception | None = None

    def put(self, outcome: Outcome) -> None:
        """Waits while the belt is full; raises _GivenUp when nobody takes any more."""
        with self._changed:
            while len(self._outcomes) >= BELT_ITEMS or self._held >= BELT_BYTES:
                self._changed.wait(POLL_S)
                if self._watch.given_up.is_set():
                    raise _GivenUp
            self._outcomes.append(outcome)
            self._held += len(outcome.data) if isinstance(outcome, Sample) else 0
            self._watch.sign()
            if len(self._outcomes) == WAKE_ITEMS or self._held >= WAKE_BYTES:
                self._changed.notify()  # for each one, the threads would only wake each other

    def end(self, error: Exception | None = None) -> None:
        with self._changed:
            self._is_over, self._error = True, error
            self._changed.notify()

    def take(self, timeout_s: float) -> list[Outcome] | None:
        """What lies there; [] when nothing has come in time, None at the end. Raises its error."""
        with self._changed:
            if not self._outcomes and not self._is_over:
                self._changed.wait(timeout_s)
            outcomes, self._outcomes, self._held = self._outcomes, [], 0
            if outcomes:
                self._watch.sign()  # if the belt was full, nothing could come till now
                self._changed.notify()
            elif self._error:
                raise self._error
            elif self._is_over:
                return None
            return outcomes


class _GivenUp(Exception):
    """Nobody waits for what is read."""


def read_watched(
    read: Callable[[Watch], Generator[Outcome, None, None]], timeout_s: float, stop: Event
) -> Iterator[Outcome]:
    """What `read` yields in a thread of its own, a bounded way ahead.

    Raises what `read` raises, TimeoutError when it gives no sign for timeout_s, and Stopped soon
    after `stop` is set.
    """
    watch = Watch()
    belt = _Belt(watch)
    Thread(target=_fill, args=(read, watch, belt), name="source", daemon=True).start()
    try:
        while not stop.is_set():
            outcomes = belt.take(min(POLL_S, timeout_s))
            if outcomes is None:
                return
            yield from outcomes
            if not outcomes and time.monotonic() - watch.last_sign > timeout_s:
                raise TimeoutError(f"it gave no byte for {timeout_s:g} s")
        raise Stopped
    finally:
        watch.given_up.set()
        for close in list(watch.close):
            close()


def _fill(
    read: Callable[[Watch], Generator[Outcome, None, None]], watch: Watch, belt: _Belt
) -> None:
    try:
        with closing(read(watch)) as outcomes:
            for outcome in outcomes:
                belt.put(outcome)
        belt.end()
    except Exception as error:  # raised again where the outcomes are used
        belt.end(error)


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """function(item) of every item, in order, `threads` at once, in threads that no exit awaits."""
    tasks: SimpleQueue[tuple[Future[R], T] | None] = SimpleQueue()

    def work() -> None:
        while task := tasks.get():
            future, item = task
            try:
                future.set_result(function(item))
            except Exception as error:
                future.set_exception(error)

    for _ in range(threads):
        Thread(target=work, name="source file", daemon=True).start()
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(Future())
            tasks.put((pending[-1], item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for _ in range(threads):
            tasks.put(None)
