"""What is in a store, in numbers and as a picture: sizes, codebook usage, classes, rejections."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from storage.reader import TokenStore

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


def codebook_usage(store: TokenStore, column: str = "codes") -> dict[str, Any]:
    """How the codes of a column are spread over the codebook.

    counts: (K,) int64; used: codes seen at least once; perplexity: exp(entropy), in [1, K];
    entropy_bits: of one code, the least a coder of single codes can reach.
    """
    size = store.meta.tokenizers[column].codebook_size
    counts = np.zeros(size, np.int64)
    for first in range(0, len(store), SPAN):
        codes = store.read_codes(slice(first, first + SPAN), column)
        counts += np.bincount(codes.reshape(-1), minlength=size)
    share = counts[counts > 0] / max(1, counts.sum())
    entropy = float(-(share * np.log(share)).sum())
    return {
        "counts": counts,
        "used": int((counts > 0).sum()),
        "perplexity": float(np.exp(entropy)),
        "entropy_bits": entropy / float(np.log(2)),
    }


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
