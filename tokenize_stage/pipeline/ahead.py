"""A generator that runs in a thread of its own, a bounded number of items ahead of its user."""

import time
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

from tokenize_stage.process import Stopped

T = TypeVar("T")
POLL_S = 0.1  # between two looks at whether to stop
JOIN_S = 2  # given to the thread to end; one that stalls in the system never does


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


def run_ahead(
    items: Generator[T, None, None], size: int, stop: Event, idle_s: float
) -> Generator[T | None, None, None]:
    """Yields the items, made up to `size` ahead, and None whenever none has come for idle_s.

    Close the generator to stop early. Raises what `items` raises, in its turn, and Stopped once
    `stop` is set, also where the next item does not come.
    """
    queue: Queue[T | _End] = Queue(size)
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
    last = time.monotonic()
    try:
        while not stop.is_set():
            try:
                item = queue.get(timeout=POLL_S)
            except Empty:
                if time.monotonic() - last >= idle_s:
                    yield None
                    last = time.monotonic()
                continue
            if not isinstance(item, _End):
                yield item
                last = time.monotonic()
            elif item.error is None:
                return
            elif not stop.is_set():  # else Ctrl-C has ended a command that was read from, too
                raise item.error
        raise Stopped
    finally:
        closed.set()
        thread.join(JOIN_S)
