"""What muse-tokenize says at its end: what this run did, what is left, what to run next."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from storage.reader import TokenStore
from storage.shard import current_folders
from storage.stats import store_sizes
from tokenize_stage.pipeline.progress import Progress
from tokenize_stage.sources.sample import InputShard

NAMES = 5  # of failed shards that are written out


def known_rows(shards: Sequence[InputShard], views: int) -> int | None:
    """Rows that the shards will give at most, where that is known before reading."""
    counts = [shard.sample_count for shard in shards]
    return None if None in counts else views * sum(count or 0 for count in counts)


def unfinished(store: Path, names: Collection[str]) -> list[str]:
    """Those of the shards' names that the store lacks; one listing, whatever their number."""
    return sorted(set(names) - set(current_folders(os.listdir(store / "shards"))))


def print_summary(
    store: Path, names: Collection[str], progress: Progress, views: int, is_complete: bool
) -> None:
    """names: of all input shards; is_complete: they are all done, and the store is sealed."""
    if progress.rows:
        shares = progress.shares()
        images, rate = progress.rows // views, progress.rows_per_s() / views
        of_views = f" in {views} views" if views > 1 else ""
        print(f"encoded {images:,} images{of_views} at {rate:,.0f} a second")
        print(
            f"  of that time {shares['decode']:.0%} without decoded images, "
            f"{shares['device']:.0%} waiting for the device, {shares['write']:.0%} writing"
        )
    if progress.skipped:
        reasons = ", ".join(f"{kind} {count:,}" for kind, count in progress.skipped.most_common())
        print(f"skipped {progress.skipped.total():,}: {reasons}")
        print(f"  one by one, with reasons, in {store}/shards/*/skipped.parquet")
    for name, reason in list(progress.failed.items())[:NAMES]:
        print(f"failed: input shard {name}: {reason}")
    if len(progress.failed) > NAMES:
        print(f"failed: {len(progress.failed) - NAMES} more, in {store}/work/failed")
    if is_complete:
        _print_store(store)
        return
    missing = unfinished(store, names)
    print(f"store {store}: {len(names) - len(missing)} of {len(names)} shards")
    print(f"next: {len(missing)} of {len(names)} input shards are still to be encoded")
    print(f"  by whom, says muse-tokenize status {store}; those of this task, the same command")


def _print_store(path: Path) -> None:
    store = TokenStore(path)
    sizes = store_sizes(store)["bits_per_code"]
    bits = ", ".join(f"{name} {bits:.3f}" for name, bits in sizes.items() if bits)
    size = f", bits a code on disk: {bits}" if bits else ""
    print(f"store {path}: {len(store.shards)} shards, {len(store):,} rows{size}")
    print(f"next: muse-store verify {path}, then muse-train config=… dataset.train_store={path}")
