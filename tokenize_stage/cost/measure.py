"""The stages of a run, each timed alone for some seconds on this machine, with its real input."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from storage.reader import TokenStore
from storage.schema import StoreMeta
from storage.stats import column_sizes
from storage.writer import ShardWriter, create_store
from tokenize_stage.pipeline.encoder import Encoder
from tokenize_stage.pipeline.rows import Row, preparation
from tokenize_stage.pipeline.stages import Stages
from tokenize_stage.pipeline.store_writer import columns
from tokenize_stage.sources.sample import InputShard, Sample, Skipped

KEPT_BYTES = 256 * 2**20  # of undecoded samples, and of pixels
SHARD_ROWS = 8192  # of the shard that is written


@dataclass
class Input:
    """What was read: some samples, all of them counted."""

    samples: list[Sample]
    seen: int  # samples
    readable: int  # of those
    samples_per_s: float

    @property
    def bytes_per_sample(self) -> float:
        return statistics.fmean(len(sample.data) for sample in self.samples)


@dataclass
class Decoded:
    """Rows of some samples, and what they took."""

    rows: list[Row]
    core_s_per_sample: float  # of all threads
    accepted: float  # share of the samples that gave rows


def read_input(stages: Stages, shard: InputShard, seconds: float, to_end: bool) -> Input:
    """Reads a shard for a while, or to its end. Raises ValueError when no sample comes."""
    found = Input([], 0, 0, 0.0)
    held, start = 0, time.perf_counter()
    for sample in _bar(stages.read(shard), "read"):
        if not found.seen:  # what it takes to open the source is not a rate
            start = time.perf_counter()
        found.seen += 1
        found.readable += isinstance(sample, Sample)
        if isinstance(sample, Sample) and held < KEPT_BYTES:
            found.samples.append(sample)
            held += len(sample.data)
        if not to_end and time.perf_counter() - start > seconds:
            break
    found.samples_per_s = found.seen / (time.perf_counter() - start)
    if not found.samples:
        raise ValueError(f"{shard.source} has no images: nothing can be measured with it")
    return found


def decode_input(stages: Stages, shard: InputShard, read: Input, seconds: float) -> Decoded:
    """Selects and decodes samples with all threads. Raises ValueError when none gives a row."""
    prepare = preparation(stages.decoder, stages.selection)(shard)
    rows: list[Row] = []
    tried = accepted = held = 0
    with ThreadPoolExecutor(stages.threads) as pool:
        warm = read.samples[: stages.threads]
        list(pool.map(prepare, warm))  # what is loaded with the first image does not count
        cpu, start = time.process_time(), time.perf_counter()
        for chunk in _bar(_chunks(read.samples, 8 * stages.threads), "decode"):
            for outcome in pool.map(prepare, chunk):
                tried += 1
                if isinstance(outcome, Skipped):
                    continue
                accepted += 1
                if tried <= len(read.samples) and held < KEPT_BYTES:
                    rows += outcome
                    held += sum(p.nbytes for row in outcome for p in row.picture.pixels)
            if time.perf_counter() - start > seconds:
                break
        cpu = time.process_time() - cpu  # unlike the clock's time, the same on a busy machine
    if not rows:
        raise ValueError(f"none of {tried} samples of {shard.source} becomes a row: see filters.*")
    return Decoded(rows, cpu / tried, accepted / tried)


def time_encoder(encoder: Encoder, stages: Stages, rows: Sequence[Row], seconds: float) -> float:
    """Rows a second, from pixels in memory to codes in memory, full batches, one always ahead."""
    batch = list(itertools.islice(itertools.cycle(rows), stages.batch_size))
    pixels = {
        resolution: np.stack([row.picture.pixels[place] for row in batch])
        for place, resolution in enumerate(stages.resolutions)
    }
    encoder.submit(pixels).result()  # the first one compiles, or chooses kernels
    count, start, pending = 1, time.perf_counter(), encoder.submit(pixels)
    with tqdm(desc="measure: encode", disable=None, leave=False) as bar:
        while time.perf_counter() - start < seconds:
            following = encoder.submit(pixels)
            pending.result()
            count, pending = count + 1, following
            bar.update()
    pending.result()
    return count * stages.batch_size / (time.perf_counter() - start)


def time_text(stages: Stages, rows: Sequence[Row], seconds: float) -> float | None:
    """Captions a second; None without text columns."""
    if not stages.text.arrays:
        return None
    captions = [row.sample.caption for row in rows][: stages.batch_size]
    stages.text.columns(captions)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        stages.text.columns(captions)
        count += len(captions)
    return count / (time.perf_counter() - start)


def write_rows(
    stages: Stages, meta: StoreMeta, rows: Sequence[Row], place: Path
) -> tuple[float, float]:
    """(Rows a second into committed shards, bytes a row of the table but for text states).

    place: a folder on the disk of the store; what is written there is removed.
    """
    made = columns(rows) | stages.text.columns([row.sample.caption for row in rows])
    generator = np.random.default_rng(0)
    for name, tokenizer in meta.tokenizers.items():
        shape = (len(rows), *meta.arrays[name].shape)
        made[name] = generator.integers(0, tokenizer.codebook_size, shape)
    with tempfile.TemporaryDirectory(prefix=".estimate-", dir=place) as folder:
        create_store(folder, meta)
        with ShardWriter(folder, "once", "", stages.fields) as writer:
            writer.add(made)
        sizes, _ = column_sizes(TokenStore(folder))
        table = sum(n for name, n in sizes.items() if not name.startswith("text_states_"))
        start = time.perf_counter()
        with ShardWriter(folder, "many", "", stages.fields) as writer:
            for _ in range(-(-SHARD_ROWS // len(rows))):
                writer.add(made)
        return writer.rows / (time.perf_counter() - start), table / len(rows)


def _chunks(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """The samples again and again, so that a small input is long enough."""
    for first in itertools.cycle(range(0, len(samples), size)):
        yield samples[first : first + size]


def _bar(items: Iterable, what: str) -> Iterable:
    return tqdm(items, desc=f"measure: {what}", disable=None, leave=False)
