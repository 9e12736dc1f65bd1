"""The rows of a store that an audit looks at, and the images that they were made from."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from storage.progress import Progress, for_each
from storage.reader import TokenStore
from tokenize_stage.sources.read import read_samples
from tokenize_stage.sources.sample import InputShard, Sample, stored_key
from tokenize_stage.sources.watch import ReadPatience


@dataclass(frozen=True)
class DrawnRow:
    """A row of a store; image_hash: sha256 of the image's bytes, in hex, where the store has it."""

    number: int
    shard: str
    key: str
    view: int
    caption: str | None
    image_hash: str | None


def draw_rows(store: TokenStore, rows: int, shards: int, seed: int) -> list[DrawnRow]:
    """Rows drawn evenly from `shards` shards, which are drawn by their numbers of rows; ascending.

    Raises ValueError for a store without rows.
    """
    counts = np.diff(store.numbers.bounds)  # without dropped rows
    filled = np.flatnonzero(counts)
    if not len(filled):
        raise ValueError(f"{store.path} has no rows: there is nothing to look at")
    generator = np.random.default_rng(seed)
    share = counts[filled] / counts.sum()
    chosen = generator.choice(filled, min(shards, len(filled)), replace=False, p=share)
    bounds = store.numbers.bounds
    pool = np.concatenate([np.arange(bounds[s], bounds[s + 1]) for s in np.sort(chosen)])
    numbers = np.sort(generator.choice(pool, min(rows, len(pool)), replace=False))
    columns = ["key", "view", "caption"]
    columns += ["image_hash"] if "image_hash" in store.columns else []
    places = np.searchsorted(bounds, numbers, side="right") - 1
    return [
        DrawnRow(
            number,
            store.shards[place],
            row["key"],
            row["view"] or 0,
            row["caption"],
            row.get("image_hash"),
        )
        for number, place, row in zip(
            numbers.tolist(), places, store.table(columns, numbers).to_pylist(), strict=True
        )
    ]


def find_images(
    rows: Sequence[DrawnRow],
    inputs: Iterable[InputShard],
    patience: ReadPatience,
    progress: Progress,
) -> tuple[dict[int, bytes], list[str]]:
    """(Row number -> the undecoded image, a sentence for every row whose image is not to be had).

    Each input shard is read no further than needed. An image that has changed is none.
    """
    by_name = {shard.name: shard for shard in inputs}
    names = sorted({row.shard for row in rows})

    def read(name: str) -> dict[str, bytes] | str:
        if name not in by_name:
            return f"input shard {name} is not among those at the sources"
        keys = {row.key for row in rows if row.shard == name}
        try:
            return _read_images(by_name[name], keys, patience)
        except (OSError, ValueError) as error:
            return str(error)

    found = dict(zip(names, for_each(read, names, progress), strict=True))
    images: dict[int, bytes] = {}
    problems: list[str] = []
    for row in rows:
        of_shard = found[row.shard]
        problem = of_shard if isinstance(of_shard, str) else _problem(row, of_shard)
        if problem:
            problems.append(f"row {row.number}: {problem}")
        elif not isinstance(of_shard, str):
            images[row.number] = of_shard[row.key]
    return images, problems


def _read_images(shard: InputShard, keys: set[str], patience: ReadPatience) -> dict[str, bytes]:
    if shard.files is not None:
        files = tuple(file for file in shard.files if stored_key(file[0]) in keys)
        shard = dataclasses.replace(shard, files=files)
    found: dict[str, bytes] = {}
    for sample in read_samples(shard, patience):
        if isinstance(sample, Sample) and sample.key in keys:
            found[sample.key] = sample.data
            if len(found) == len(keys):
                break
    return found


def _problem(row: DrawnRow, images: Mapping[str, bytes]) -> str | None:
    if row.key not in images:
        return f"{row.key} is no longer in input shard {row.shard}"
    if row.image_hash and sha256(images[row.key]).hexdigest() != row.image_hash:
        return f"the image {row.key} of input shard {row.shard} has changed since it was encoded"
    return None
