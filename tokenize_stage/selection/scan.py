"""muse-tokenize scan: hashes of all images, to find duplicates before any of them is encoded.

    muse-tokenize scan dataset.shards_path_or_url=laion/{00000..00099}.tar out=scans/
    muse-tokenize scan config=scan.yaml task=3 tasks=8        # or in a Slurm job array

One Parquet file an input shard, whole or not at all: key, image_hash (sha256), phash, url, width,
height of every image that passes filters.* and can be decoded. Give it the filters of the encoding
run: else the image that is kept of a group may be one that is rejected there. Run the same command
again after any interruption: finished shards are skipped. `muse-tokenize dedup` is next.

No GPU is needed. Large JPEGs are decoded at 1/2 to 1/8 of their size, which changed 0 or 2 of the
64 bits of pHash for 60 photographs; dataset.preprocessing.dct_scaling=0 decodes them in full. Exit
status: 0 done, 2 refused before any work, 3 some input shards could not be read, 75 stopped by
SIGTERM, SIGUSR1 or Ctrl-C and to be run again.
"""

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from configs.load import load_command_config
from storage.atomic import atomic_file
from storage.writer import expect_shards
from tokenize_stage.pixels.decode import BadImage
from tokenize_stage.pixels.views import Decoder
from tokenize_stage.process import EXIT_FAILED, EXIT_STOPPED, Stopped, refuse, stop_on_signals
from tokenize_stage.selection import metadata as said
from tokenize_stage.selection.config import ScanConfig
from tokenize_stage.selection.filters import Selection, ShardSelection
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.sources.read import read_patience, read_samples
from tokenize_stage.sources.sample import InputShard, Sample, Skipped
from tokenize_stage.sources.watch import map_ahead
from tokenize_stage.work.work_split import share_of, this_task

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image_hash", pa.binary(32), nullable=False),
        pa.field("phash", pa.uint64()),
        pa.field("url", pa.string()),
        pa.field("width", pa.int32(), nullable=False),  # 0: not decoded, and not in the metadata
        pa.field("height", pa.int32(), nullable=False),
    ]
)
RESOLUTION = 64  # of which pHash needs half
Row = dict[str, Any]


@dataclass
class Scan:
    """What this task is to do: `todo` of its share of all shards."""

    config: ScanConfig
    selection: Selection
    decoder: Decoder | None
    todo: list[InputShard]
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    rows: int = 0


def main(argv: list[str] | None = None) -> int:
    """Scans this task's share of the input shards; returns the exit status."""
    config = load_command_config(ScanConfig, argv, __doc__ or "")
    failed = 0
    with stop_on_signals() as stop:
        try:
            scan = plan(config)
        except (ValueError, OSError) as error:
            return refuse(error)
        with tqdm(desc="scan", unit=" images", mininterval=1 if sys.stderr.isatty() else 30) as bar:
            for number, shard in enumerate(scan.todo, 1):
                bar.set_postfix_str(f"shard {number} of {len(scan.todo)}", refresh=False)
                try:
                    scan_shard(scan, shard, stop, bar.update)
                except Stopped:
                    print("stopped by a signal; finished scans are kept: run it again")
                    return EXIT_STOPPED
                except OSError as error:
                    failed += 1
                    tqdm.write(f"failed: {shard.name}: {error}", sys.stderr)
    kinds = "".join(f", {kind} {count:,}" for kind, count in scan.skipped.most_common())
    print(f"scanned {scan.rows:,} images into {config.out}{kinds}")
    if failed:
        print(f"{failed} shards could not be read: run it again", file=sys.stderr)
        return EXIT_FAILED
    print(f"next, when all tasks are done: muse-tokenize dedup scans={config.out} out=FILE.parquet")
    return 0


def plan(config: ScanConfig) -> Scan:
    """Finds the work; refuses what is wrong, also a scan of the same name of something else."""
    out = Path(config.out)
    task, tasks = this_task(config.task, config.tasks, os.environ)
    filters = dataclasses.replace(config.filters, duplicates=None, phash=config.phash == "image")
    selection = Selection(filters)
    decoder = None
    if config.phash == "image":
        preprocessing = dataclasses.replace(
            config.dataset.preprocessing,
            resolution=RESOLUTION,
            views=["centre"],
            decode_device="cpu",
        )
        decoder = Decoder(preprocessing, [RESOLUTION], phash=True)
    shards = list_input_shards(config.dataset)
    out.mkdir(parents=True, exist_ok=True)
    expect_shards(out, [shard.name for shard in shards])  # all tasks': `dedup` counts them
    mine = share_of(shards, task, tasks)
    todo = [shard for shard in mine if not _is_scanned(out, shard)]
    print(f"task {task} of {tasks}: {len(mine)} of {len(shards)} shards, {len(todo)} to do")
    return Scan(config, selection, decoder, todo)


def scan_shard(scan: Scan, shard: InputShard, stop: Event, add: Callable[[int], Any]) -> None:
    """Scans one input shard and writes its file; `add` is told the images as they come.

    Raises OSError when the input cannot be read, and Stopped soon after `stop` was set.
    """
    of_shard, config = scan.selection.for_shard(shard.name), scan.config
    threads = config.threads or len(os.sched_getaffinity(0))
    samples = read_samples(shard, read_patience(config.dataset), stop)
    rows: dict[str, Row] = {}  # a key that comes twice: its first image
    skipped: Counter[str] = Counter()
    for outcome in map_ahead(lambda sample: _look(scan, of_shard, sample), samples, threads):
        if isinstance(outcome, Skipped):
            skipped[outcome.reason.partition(":")[0]] += 1
        else:
            rows.setdefault(outcome["key"], outcome)
        add(1)
    table = pa.Table.from_pylist(list(rows.values()), schema=SCHEMA)
    about = {"source": shard.source, "skipped": json.dumps(skipped)}
    with atomic_file(_path(Path(config.out), shard)) as temporary:
        pq.write_table(table.replace_schema_metadata(about), temporary, compression="zstd")
    scan.skipped.update(skipped)
    scan.rows += len(table)


def _look(scan: Scan, of_shard: ShardSelection, sample: Sample | Skipped) -> Row | Skipped:
    """The hashes of one sample, or why it will not be encoded; called by many threads."""
    if isinstance(sample, Skipped):
        return sample
    digest, about = sha256(sample.data), sample.metadata
    reason, phash, size = (
        of_shard.check(sample, digest.hexdigest()),
        None,
        said.original_size(about),
    )
    if reason is None and scan.decoder:
        try:
            (picture,) = scan.decoder.decode(sample.data, digest.hexdigest())
        except BadImage as error:
            return Skipped(sample.key, sample.source, f"bad image: {error}")
        reason = of_shard.check_picture(sample, picture)
        phash, size = picture.phash, (picture.original_width, picture.original_height)
    elif scan.config.phash == "metadata":
        phash = said.phash_of(about)
    if reason:
        return Skipped(sample.key, sample.source, reason)
    return {
        "key": sample.key,
        "image_hash": digest.digest(),
        "phash": int(phash, 16) if phash else None,
        "url": said.url_of(about),
        "width": size[0] or 0,
        "height": size[1] or 0,
    }


def _is_scanned(out: Path, shard: InputShard) -> bool:
    path = _path(out, shard)
    if not path.is_file():
        return False
    source = (pq.read_schema(path).metadata or {}).get(b"source", b"").decode()
    if source != shard.source:
        raise ValueError(
            f"{path} is the scan of {source}, not of {shard.source}; choose another out="
        )
    return True


def _path(out: Path, shard: InputShard) -> Path:
    return out / f"{shard.name}.parquet"


if __name__ == "__main__":
    sys.exit(main())
