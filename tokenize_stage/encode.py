"""muse-tokenize: images -> token store, steps 1 to 4 (`python -m tokenize_stage.encode`).

    muse-tokenize config=configs/tokenize/fashion_mnist.yaml
    muse-tokenize dataset.shards_path_or_url=photos/ model.vq_model.pretrained=tokenizer/ \\
        store.path=store/ task=0 tasks=8

One input shard (a tar, or a part of an image folder) becomes one shard of the store, whole or not
at all. Run the same command again after any interruption: finished shards are skipped. Samples
that cannot be encoded are counted, and listed with a reason in the store. Exit status: 0 done,
2 refused before any work, 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C and to be run again.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs.load import load_command_config
from storage.pretrained import model_fingerprint
from storage.reader import TokenStore
from storage.schema import ArrayColumn, StoreMeta, Tokenizer, codes_dtype
from storage.seal import seal
from storage.stats import store_sizes
from storage.writer import ShardWriter, create_store, expect_shards
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.pipeline.decode_ahead import Decoded, Outcome, decode_ahead
from tokenize_stage.pipeline.progress import Progress
from tokenize_stage.pixels.decode import TRANSFORM
from tokenize_stage.process import (
    EXIT_STOPPED,
    Stopped,
    pick_device,
    refuse,
    stop_on_signals,
)
from tokenize_stage.sources.input_shards import InputShard, list_input_shards
from tokenize_stage.sources.sample import Skipped
from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq.model import VQModel
from tokenize_stage.work.remaining import remaining_shards
from tokenize_stage.work.work_split import share_of, this_task


@dataclass
class Job:
    """What this task is to do: `todo`, of its `mine`, of all input `shards`."""

    shards: list[InputShard]
    mine: list[InputShard]
    todo: list[InputShard]
    task: int
    tasks: int
    store: Path
    encode: Callable[[np.ndarray], np.ndarray]


def main(argv: list[str] | None = None) -> int:
    """Encodes this task's share of the input shards; returns the exit status."""
    config = load_command_config(TokenizeConfig, argv, __doc__ or "")
    with stop_on_signals() as stop:
        try:
            job = plan(config)
        except (ValueError, OSError) as error:
            return refuse(error)
        print(
            f"task {job.task} of {job.tasks}: {len(job.mine)} of {len(job.shards)} input shards, "
            f"{len(job.mine) - len(job.todo)} finished before, {len(job.todo)} to do"
        )
        status = 0
        with closing(Progress(len(job.todo), known_rows_per_shard(job))) as progress:
            try:
                encode_shards(job, config, progress, stop)
            except Stopped:
                status = EXIT_STOPPED
    if not remaining_shards(job.store, job.shards):
        seal(job.store)  # the last task does; that two may is harmless
    print_summary(job, progress)
    if status == EXIT_STOPPED:
        print("stopped by a signal; finished shards are kept: run the same command again")
    return status


def plan(config: TokenizeConfig) -> Job:
    """Finds the work, loads the tokenizer, makes or checks the store; refuses what is wrong."""
    dataset, path = config.dataset, Path(config.store.path)
    task, tasks = this_task(config.task, config.tasks, os.environ)
    device = pick_device("encode.device", config.encode.device, os.environ)
    shards = list_input_shards(dataset.shards_path_or_url, dataset.images_per_shard)
    mine = share_of(shards, task, tasks)
    vq = load_vq_model(config.model.vq_model.pretrained)
    meta = store_meta(config, vq, shards)
    try:
        create_store(path, meta)
    except OSError as error:
        raise ValueError(f"store.path={path} cannot be written: {error}") from error
    todo = remaining_shards(path, mine)
    expect_shards(path, [shard.name for shard in shards])  # all tasks': `verify` counts them
    print(f"tokenizer {config.model.vq_model.pretrained} on {device} in {config.encode.dtype}")
    vq.to(device, getattr(torch, config.encode.dtype)).to(memory_format=torch.channels_last)
    return Job(shards, mine, todo, task, tasks, path, pixel_encoder(vq))


def encode_shards(
    job: Job, config: TokenizeConfig, progress: Progress, stop: threading.Event
) -> None:
    """Reads, decodes, encodes and writes the shards to do, one after the other.

    Raises Stopped soon after `stop` was set; that, and any error, abandons the shard in hand.
    """
    batch_size, resolution = config.encode.batch_size, config.dataset.preprocessing.resolution
    threads = config.encode.decode_threads or len(os.sched_getaffinity(0))
    with closing(decode_ahead(job.todo, resolution, threads, batch_size, stop)) as outcomes:
        for shard in job.todo:
            writer = ShardWriter(job.store, shard.name, source=shard.source)
            for batch in batches(outcomes, batch_size, writer, progress):
                with progress.phase("encode"):
                    codes = job.encode(np.stack([row.picture.pixels for row in batch]))
                with progress.phase("write"):
                    writer.add(columns(batch, codes))
                progress.add_rows(len(batch))
            with progress.phase("write"):
                writer.commit()
            progress.shard_done()


def batches(
    outcomes: Iterator[Outcome], batch_size: int, writer: ShardWriter, progress: Progress
) -> Iterator[list[Decoded]]:
    """Groups what is decoded of one shard; what is rejected goes to the writer's list at once."""
    batch: list[Decoded] = []
    while (outcome := progress.waiting(outcomes)) is not None:
        if isinstance(outcome, Skipped):
            writer.skip(outcome.key, outcome.reason)
            progress.add_skipped(outcome.reason)
            continue
        batch.append(outcome)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def pixel_encoder(vq: VQModel) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, 3, R, R) uint8 -> codes (B, N) that runs `vq` where and as it is.

    On a GPU, float32 means float32 (no TF32) and algorithms that repeat their results.
    """
    weight = next(vq.parameters())

    @torch.inference_mode()
    def encode(pixels: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(pixels).to(weight.device)  # (B, 3, R, R) uint8
        batch = batch.to(torch.float32, memory_format=torch.channels_last) / 255
        with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            return vq.encode(batch.to(weight.dtype)).cpu().numpy()  # (B, N), a sync point

    return encode


def columns(batch: Sequence[Decoded], codes: np.ndarray) -> dict[str, object]:
    """The rows of a batch, column by column, as ShardWriter takes them."""
    pictures = [row.picture for row in batch]
    return {
        "codes": codes,  # (B, N)
        "key": [row.sample.key for row in batch],
        "class_id": [row.sample.class_id for row in batch],
        "caption": [row.sample.caption for row in batch],
        "original_height": [picture.original_height for picture in pictures],
        "original_width": [picture.original_width for picture in pictures],
        "crop_top": [picture.crop_top for picture in pictures],
        "crop_left": [picture.crop_left for picture in pictures],
        "crop_height": [picture.crop_height for picture in pictures],
        "crop_width": [picture.crop_width for picture in pictures],
        "view": [0] * len(batch),
    }


def store_meta(config: TokenizeConfig, vq: VQModel, shards: Sequence[InputShard]) -> StoreMeta:
    """What store.json will say. Raises ValueError for a resolution the tokenizer cannot divide."""
    resolution = config.dataset.preprocessing.resolution
    if resolution % vq.reduction:
        raise ValueError(
            f"dataset.preprocessing.resolution={resolution} is no multiple of {vq.reduction}, "
            "the pixels along a side of one code of this tokenizer"
        )
    h, w = vq.grid(resolution)
    pretrained = config.model.vq_model.pretrained
    tokenizer = Tokenizer(  # a folder is found from everywhere, a hub name stays one
        name=str(Path(pretrained).resolve()) if Path(pretrained).is_dir() else pretrained,
        class_name=type(vq).__name__,
        codebook_size=vq.codebook_size,
        grid=[h, w],
        fingerprint=model_fingerprint(vq),
    )
    names = next((list(shard.class_names) for shard in shards if shard.class_names), [])
    return StoreMeta(
        resolution=resolution,
        arrays={"codes": ArrayColumn(codes_dtype(vq.codebook_size), [h * w])},
        tokenizers={"codes": tokenizer},
        transform={**TRANSFORM, "dtype": config.encode.dtype, "class_names": names},
        backend=config.store.backend,
        chunk_rows=config.store.chunk_rows,
    )


def known_rows_per_shard(job: Job) -> float | None:
    """Images in a shard to do, where that is known before reading: for the time left."""
    files = [len(shard.files) for shard in job.todo if shard.files is not None]
    if files:
        return sum(files) / len(files)
    store = TokenStore(job.store)
    return len(store) / len(store.shards) if store.shards else None


def print_summary(job: Job, progress: Progress) -> None:
    """What this run did, what the store holds now, and what to run next."""
    if job.todo:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in progress.shares().items())
        rate = progress.images_per_s()
        print(f"encoded {progress.rows:,} images at {rate:,.0f} a second ({shares})")
    if progress.skipped:
        reasons = ", ".join(f"{kind} {count:,}" for kind, count in progress.skipped.most_common())
        print(f"skipped {progress.skipped.total():,}: {reasons}")
        print(f"  one by one, with reasons, in {job.store}/shards/*/skipped.parquet")
    store = TokenStore(job.store)
    missing = sorted({shard.name for shard in job.shards} - set(store.shards))
    bits = store_sizes(store)["bits_per_code"].get("codes")
    size = f", {bits:.3f} bits a code on disk" if bits else ""
    print(f"store {job.store}: {len(store.shards)} shards, {len(store):,} rows{size}")
    if missing:
        print(f"next: {len(missing)} of {len(job.shards)} input shards are still to be encoded")
    else:
        train = f"muse-train config=… dataset.train_store={job.store}"
        print(f"next: muse-store verify {job.store}, then {train}")


if __name__ == "__main__":
    sys.exit(main())
