"""What a store's columns will take, said before a run: text states are most of it, or nothing.

muse-tokenize prints describe_cost before it begins; muse-tokenize estimate counts with row_bytes.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from storage.schema import StoreMeta
from storage.shard import BACKENDS
from tokenize_stage.text.text_columns import TextColumns

ASSUMED_IDS = 24  # of a caption, where none could be looked at
TABLE_BYTES = 100  # of a row in rows.parquet, about: key, caption, crop box, scores; compressed
LARGE = 0.5  # share of a store from which a column is called large


def row_bytes(
    text: TextColumns, meta: StoreMeta, captions: Sequence[str | None] = ()
) -> dict[str, float]:
    """Column -> bytes a row on disk, of everything that a store of `meta` holds.

    Codes and float16 count as they are, ids as a sample compresses: `captions`, the first of a
    run; without any, ASSUMED_IDS a caption. "rows.parquet" is the rest of the table, about.
    """
    found: dict[str, float] = {}
    for name, column in meta.arrays.items():
        bits = 8 * np.dtype(column.dtype).itemsize
        if name in meta.tokenizers and meta.backend == "zarr":
            bits = math.ceil(math.log2(meta.tokenizers[name].codebook_size))
        found[name] = math.prod(column.shape) * bits / 8
    for name, length in mean_lengths(text, captions).items():
        if meta.backend == "zarr":
            found[f"text_ids_{name}"] = _ids_bytes(text, name, captions, meta.chunk_rows)
        encoder = text.encoders.get(name)
        if encoder is not None and encoder.wants_states:
            found[f"text_states_{name}"] = length * encoder.width * 2
    return found | {"rows.parquet": TABLE_BYTES}


def mean_lengths(text: TextColumns, captions: Sequence[str | None] = ()) -> dict[str, float]:
    """NAME -> ids a caption that are no padding; without captions, as assumed."""
    texts = [caption or "" for caption in captions]
    return {
        name: float(tokenizer(texts).lengths.mean())
        if texts
        else min(ASSUMED_IDS, tokenizer.length)
        for name, tokenizer in text.tokenizers.items()
    }


def describe_cost(
    text: TextColumns, meta: StoreMeta, captions: Sequence[str | None], rows: int
) -> str:
    """The table to print: of each column the bytes a row, of `rows` rows, and its share."""
    basis = f"of the first {len(captions):,}" if captions else "assumed, as none was read"
    lengths = mean_lengths(text, captions).items()
    bytes_by_column = row_bytes(text, meta, captions)
    whole = sum(bytes_by_column.values())
    lines = [
        f"ids a caption, {basis}: " + ", ".join(f"{n} {length:.1f}" for n, length in lengths),
        f"  {'column':<22} {'bytes a row':>12} {f'{rows:,} rows':>20} {'share':>7}",
    ]
    for name, size in [*bytes_by_column.items(), ("all", whole)]:
        total = f"{size * rows / 1e9:,.3f} GB"
        lines.append(f"  {name:<22} {size:>12,.1f} {total:>20} {size / whole:>7.1%}")
    for name, size in bytes_by_column.items():
        if name.startswith("text_states_") and size > LARGE * whole:
            ids = bytes_by_column[name.replace("states", "ids", 1)]
            lines.append(
                f"  {name} is {size / whole:.0%} of the store; training can make the same states "
                f"from the ids, {ids:,.0f} bytes a row"
            )
    return "\n".join(lines)


def _ids_bytes(
    text: TextColumns, name: str, captions: Sequence[str | None], chunk_rows: int
) -> float:
    """Bytes a row of compressed ids: of a sample as it is written, else two for every id."""
    tokenizer = text.tokenizers[name]
    if not captions:
        return 2.0 * min(ASSUMED_IDS, tokenizer.length)
    ids = tokenizer([caption or "" for caption in captions]).ids
    with tempfile.TemporaryDirectory() as folder:
        BACKENDS["zarr"].write_array(Path(folder, "ids.zarr"), ids, chunk_rows)
        files = [path for path in Path(folder, "ids.zarr", "c").rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files) / len(ids)
