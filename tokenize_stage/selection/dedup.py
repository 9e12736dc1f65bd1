"""muse-tokenize dedup: which images are duplicates, from the scans of all shards.

    muse-tokenize dedup scans=scans/ out=duplicates.parquet
    muse-tokenize dedup scans=scans/ out=duplicates.parquet distance=2 keep=largest

Of images with equal bytes, or with perceptual hashes at most `distance` bits apart (directly or by
way of others), one is kept: the first by name of shard and place in it, or that of most pixels. All
others are written to `out`; `muse-tokenize encode filters.duplicates=OUT` then drops or marks them,
each task its own, without a word between tasks.

Bytes are compared by 64 bits of their sha256: among 10^8 images one pair of different ones is taken
for equal with a probability of 3e-4. One core, measured: 10^7 images in 9 s by bytes alone, in 47 s
with distance=4; 80 bytes of memory an image, so 8 GB for 10^8.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.load import load_command_config
from storage.progress import progress_bar
from storage.writer import expected_shards
from tokenize_stage.process import refuse
from tokenize_stage.selection.config import DedupConfig
from tokenize_stage.selection.duplicates import SCHEMA, write_duplicates
from tokenize_stage.selection.near import group_rows, keep_largest


class Scans:
    """The scans of a folder as one long table; of its rows only 20 bytes each are in memory.

    hashes, phashes: (n,) uint64, phash 0 where there is none. areas: (n,) int32, pixels.
    """

    def __init__(self, folder: Path, shards: Sequence[str]):
        self.folder, self.shards = folder, list(shards)
        counts = [pq.read_metadata(self._path(shard)).num_rows for shard in self.shards]
        self.bounds = np.cumsum([0, *counts])  # (shards + 1,) first row of each
        self.hashes, self.phashes = np.zeros((2, self.bounds[-1]), np.uint64)
        self.areas = np.zeros(self.bounds[-1], np.int32)
        for shard in progress_bar("read scans")(range(len(self.shards)), len(self.shards)):
            rows = slice(self.bounds[shard], self.bounds[shard + 1])
            table = self._read(shard, ["image_hash", "phash", "width", "height"])
            self.hashes[rows] = _first_8_bytes(table["image_hash"])
            self.phashes[rows] = table["phash"].fill_null(0).to_numpy()
            area = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
            self.areas[rows] = area.clip(max=2**31 - 1)

    def keys(self, rows: np.ndarray) -> pa.ChunkedArray:
        """The keys of some rows, given in rising order."""
        cuts = np.searchsorted(rows, self.bounds)
        parts = [
            self._read(shard, ["key"])["key"].take(pa.array(rows[start:end] - self.bounds[shard]))
            for shard, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False))
            if end > start
        ]
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())

    def shard_names(self, rows: np.ndarray) -> pa.Array:
        """The shards of some rows."""
        places = np.searchsorted(self.bounds, rows, "right") - 1
        return pa.array(self.shards, pa.string()).take(pa.array(places))

    def _read(self, shard: int, columns: list[str]) -> pa.Table:
        return pq.read_table(self._path(self.shards[shard]), columns=columns)

    def _path(self, shard: str) -> Path:
        return self.folder / f"{shard}.parquet"


def main(argv: list[str] | None = None) -> int:
    """Finds the duplicates among all scanned images; returns the exit status."""
    config = load_command_config(DedupConfig, argv, __doc__ or "")
    try:
        scans = Scans(Path(config.scans), scanned_shards(config))
        bar = progress_bar("compare", "sort")
        first = group_rows(scans.hashes, scans.phashes, config.distance, bar)
        kept = keep_largest(first, scans.areas) if config.keep == "largest" else first
        table = duplicates_table(scans, kept)
        write_duplicates(Path(config.out), table, scans.shards)
    except (ValueError, OSError) as error:
        return refuse(error)
    print_summary(scans, kept, table)
    print(f"wrote {config.out}; next: muse-tokenize encode … filters.duplicates={config.out}")
    return 0


def scanned_shards(config: DedupConfig) -> list[str]:
    """Names of the shards, sorted. Raises FileNotFoundError, ValueError when some are missing."""
    found = sorted(path.stem for path in Path(config.scans).glob("*.parquet"))
    if not found:
        raise FileNotFoundError(f"no scans in {config.scans}; muse-tokenize scan makes them")
    missing = sorted(expected_shards(config.scans) - set(found))
    if missing and not config.partial:
        raise ValueError(
            f"{config.scans} lacks the scans of {len(missing)} shards, {missing[0]} first: run "
            "muse-tokenize scan again, or go on without them by partial=true"
        )
    return found


def duplicates_table(scans: Scans, kept: np.ndarray) -> pa.Table:
    """One row of duplicates.SCHEMA for each row of `scans` that keeps another, in their order."""
    rows = np.flatnonzero(kept != np.arange(len(kept)))
    of = kept[rows]
    named = np.union1d(rows, of)
    keys = scans.keys(named)
    is_exact = scans.hashes[rows] == scans.hashes[of]
    columns = {
        "shard": scans.shard_names(rows),
        "key": keys.take(pa.array(np.searchsorted(named, rows))),
        "image_hash": [f"{digest:016x}" for digest in scans.hashes[rows].tolist()],
        "kind": pa.array(["near", "exact"]).take(pa.array(is_exact.astype(np.int8))),
        "of_shard": scans.shard_names(of),
        "of_key": keys.take(pa.array(np.searchsorted(named, of))),
    }
    return pa.table(columns, schema=SCHEMA)


def print_summary(scans: Scans, kept: np.ndarray, table: pa.Table) -> None:
    """Counts, and the largest group: where that is far too large, so is `distance`."""
    exact = table["kind"].to_pylist().count("exact")
    share = len(table) / max(len(kept), 1)
    print(
        f"{len(kept):,} images in {len(scans.shards):,} shards: {exact:,} exact and "
        f"{len(table) - exact:,} near duplicates ({share:.2%})"
    )
    if len(table):
        sizes = np.bincount(kept)
        head = np.array([sizes.argmax()])
        (shard,), (key,) = scans.shard_names(head).to_pylist(), scans.keys(head).to_pylist()
        groups = int((sizes > 1).sum())
        print(f"{groups:,} groups; the largest has {sizes.max():,} images: {key} of shard {shard}")


def _first_8_bytes(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) uint64 of a column of 32 bytes a value: of the first 8, big-endian."""
    parts = [np.empty(0, np.uint64)]
    for chunk in column.chunks:
        words = np.frombuffer(chunk.buffers()[1] or b"", ">u8", 4 * (chunk.offset + len(chunk)))
        parts.append(words[4 * chunk.offset :: 4])
    return np.concatenate(parts)


if __name__ == "__main__":
    sys.exit(main())
