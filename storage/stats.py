"""What is in a store, in numbers and as a picture: sizes, codebook usage, classes, rejections."""

from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from storage.reader import TokenStore
from storage.shard import ROWS

SPAN = 65_536  # rows read at once


def store_sizes(store: TokenStore) -> dict[str, Any]:
    """Rows, shards, rejected samples and bytes by file, from the manifests alone.

    "bits_per_code" is what the code columns take on disk, all their files counted; "dropped" are
    rows on disk that no reader sees.
    """
    columns: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for summary in store.index.summaries:
        reasons.update(summary["skip_reasons"])
        for name, size in summary["bytes"].items():
            columns[name.split(".", 1)[0]] += size
    disk_rows = int(store.index.rows.sum())
    codes_per_row = {c: int(np.prod(store.meta.arrays[c].shape)) for c in store.meta.tokenizers}
    return {
        "rows": len(store),
        "dropped": len(store.numbers.dropped),
        "shards": len(store.shards),
        "skipped": sum(summary["skipped"] for summary in store.index.summaries),
        "skip_reasons": dict(reasons),
        "bytes": dict(columns),
        "bits_per_code": {
            c: columns[c] * 8 / (disk_rows * n) for c, n in codes_per_row.items() if disk_rows
        },
    }


def column_sizes(store: TokenStore, shards: int = 64) -> tuple[dict[str, int], int]:
    """(Bytes of every table column, compressed, in all shards; the number of shards looked at).

    Reads the footers of at most `shards` Parquet files, spread evenly, and scales by rows.
    """
    filesystem, root = fsspec.url_to_fs(store.files.url)
    picks = np.unique(np.linspace(0, len(store.shards) - 1, shards).astype(int))
    picks = picks[store.index.rows[picks] > 0] if len(store.shards) else picks[:0]
    sizes: Counter[str] = Counter()
    for shard in picks.tolist():
        path = f"{root}/shards/{store.index.folders[shard]}/{ROWS}"
        footer = pq.read_metadata(path, filesystem=filesystem)
        for group in range(footer.num_row_groups):
            for place in range(footer.num_columns):
                column = footer.row_group(group).column(place)
                name = column.path_in_schema.split(".")[0]
                sizes[name] += column.total_compressed_size
    scale = store.index.rows.sum() / max(1, store.index.rows[picks].sum())
    return {name: round(size * scale) for name, size in sizes.items()}, len(picks)


def codebook_usage(
    store: TokenStore, column: str = "codes", max_rows: int | None = None
) -> dict[str, Any]:
    """How the codes of a column are spread over the codebook.

    max_rows: takes about so many, in whole chunks spread evenly over the store. rows: how many
    were read; counts: (K,) int64; used: codes seen at least once; perplexity: exp(entropy), in
    [1, K]; entropy_bits: of one code, the least a coder of single codes can reach.
    """
    counts = np.zeros(store.meta.tokenizers[column].codebook_size, np.int64)
    spans = _spans(store, max_rows)
    for first, end in spans:
        codes = store.read_codes(slice(first, end), column)
        counts += np.bincount(codes.reshape(-1), minlength=len(counts))
    share = counts[counts > 0] / max(1, counts.sum())
    entropy = float(-(share * np.log(share)).sum())
    return {
        "rows": sum(end - first for first, end in spans),
        "counts": counts,
        "used": int((counts > 0).sum()),
        "perplexity": float(np.exp(entropy)),
        "entropy_bits": entropy / float(np.log(2)),
    }


def _spans(store: TokenStore, max_rows: int | None) -> list[tuple[int, int]]:
    """Runs of rows to read: all of them, or chunks that are spread evenly."""
    if max_rows is None or max_rows >= len(store):
        return [(at, min(at + SPAN, len(store))) for at in range(0, len(store), SPAN)]
    bounds = store.chunk_bounds()
    count = max(1, max_rows // store.meta.chunk_rows)
    picks = np.unique(np.linspace(0, len(bounds) - 2, count).astype(int))
    return list(zip(bounds[picks].tolist(), bounds[picks + 1].tolist(), strict=True))


def class_histogram(store: TokenStore) -> dict[int, int]:
    """Rows of every class id, in order; -1 counts rows without one."""
    ids, counts = np.unique(store.read_column("class_id"), return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def draw_stats(store: TokenStore, path: Path, usages: dict[str, dict[str, Any]]) -> None:
    """Writes a PNG: codebook usage (of every code column) by rank, and rows by class."""
    columns = list(usages)
    figure = Figure(figsize=(5 * (len(columns) + 1), 3.6), layout="constrained")
    panels = figure.subplots(1, len(columns) + 1)
    for panel, column in zip(panels, columns, strict=False):
        usage = usages[column]
        counts = np.sort(usage["counts"])[::-1]
        panel.fill_between(np.arange(len(counts)), counts / max(1, counts.sum()), step="mid")
        panel.axhline(1 / len(counts), color="0.4", lw=0.8, ls="--", label="uniform")
        panel.set(xlabel="code, by rank", ylabel="share of all codes", yscale="log")
        panel.set_title(
            f"{column}: {usage['used']}/{len(counts)} used, ppl {usage['perplexity']:.0f}"
        )
        panel.legend(frameon=False)
    classes = class_histogram(store)
    panels[-1].bar(list(classes), list(classes.values()), width=0.9)
    panels[-1].set(xlabel="class_id (-1: none)", ylabel="rows", title=f"{len(store):,} rows")
    figure.savefig(path, dpi=120)
