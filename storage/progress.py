"""Progress of a loop: what the commands show and what library calls leave out."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # (items, how many) -> the same items
WORKERS = 4  # shards in memory at once; what takes time releases the interpreter's lock


def no_progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    """The items as they are."""
    return items


def progress_bar(description: str, unit: str = "shard") -> Progress:
    """A bar with rate and remaining time on stderr; silent where that is not a terminal."""

    def bar(items: Iterable[Any], total: int) -> Iterable[Any]:
        return tqdm(items, total=total, desc=description, unit=unit, disable=None)

    return bar


def for_each(work: Callable[[Any], Any], items: Sequence[Any], progress: Progress) -> list[Any]:
    """[work(item) for item in items] by a few threads; the first error ends it."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(progress(pool.map(work, items), len(items)))
