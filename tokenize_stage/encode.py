"""muse-tokenize encode: images -> token store, steps 1 to 4 (`python -m tokenize_stage.encode`).

    muse-tokenize config=configs/tokenize/fashion_mnist.yaml
    muse-tokenize dataset.shards_path_or_url=photos/ model.vq_model.pretrained=tokenizer/ \\
        store.path=store/ task=0 tasks=8

One input shard (a tar, or a part of a folder or table) becomes one shard of the store, whole or
not at all. Run the same command again after any interruption: finished shards are skipped. Samples
that cannot be encoded are counted, and listed with a reason in the store; input shards that cannot
be read are noted, and the others go on. Exit status: 0 done, 2 refused, 3 done but
for input shards that failed, 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C and to be run again.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from configs.load import dump_config, load_command_config
from storage.atomic import atomic_file, sweep_staging
from storage.seal import seal
from storage.writer import create_store, expect_shards, expected_shards
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.pipeline.batches import batches, stacked_pixels
from tokenize_stage.pipeline.decode_ahead import decode_ahead
from tokenize_stage.pipeline.encoder import OutOfRange
from tokenize_stage.pipeline.progress import Progress
from tokenize_stage.pipeline.rows import preparation
from tokenize_stage.pipeline.stages import Stages, build_stages, encoder_dtype
from tokenize_stage.pipeline.store_writer import StoreWriter
from tokenize_stage.pipeline.summary import known_rows, print_summary, unfinished
from tokenize_stage.pipeline.tokenizers import load_tokenizers, store_meta
from tokenize_stage.process import (
    EXIT_FAILED,
    EXIT_STOPPED,
    Stopped,
    pick_device,
    refuse,
    stop_on_signals,
)
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.sources.sample import InputShard
from tokenize_stage.text.cost import describe_cost
from tokenize_stage.work.ledger import State, TaskReport, failures
from tokenize_stage.work.plan import WORK, read_plan
from tokenize_stage.work.remaining import remaining_shards
from tokenize_stage.work.work_split import share_of, this_task


@dataclass
class Job:
    """What this task is to do: `todo`, of its `mine`, of the input shards called `names`."""

    names: Sequence[str]
    mine: list[InputShard]
    todo: list[InputShard]
    task: int
    tasks: int
    store: Path


def main(argv: list[str] | None = None) -> int:
    """Encodes this task's share of the input shards; returns the exit status."""
    config = load_command_config(TokenizeConfig, argv, __doc__ or "")
    with stop_on_signals() as stop:
        try:
            job, stages = plan(config, stop)
        except (ValueError, OSError) as error:
            return refuse(error)
        print(
            f"task {job.task} of {job.tasks}: {len(job.mine)} of {len(job.names)} input shards, "
            f"{len(job.mine) - len(job.todo)} finished before, {len(job.todo)} to do"
        )
        progress = Progress(len(job.todo), known_rows(job.todo, stages.views))
        try:
            state = run(job, stages, progress, stop)
        except OutOfRange as error:
            return refuse(error)
    names = expected_shards(job.store)  # those of earlier, larger plans, too
    is_complete = not unfinished(job.store, names)
    if is_complete:
        seal(job.store)  # the last task does; that two may is harmless
    print_summary(job.store, names, progress, stages.views, is_complete)
    for line in stages.text.summary() if job.todo else ():
        print(line)
    if state == "stopped":
        print("stopped by a signal; finished shards are kept: run the same command again")
        return EXIT_STOPPED
    return EXIT_FAILED if progress.failed else 0


def plan(config: TokenizeConfig, stop: Event) -> tuple[Job, Stages]:
    """Finds the work, loads the models, makes or checks the store; refuses what is wrong."""
    path = Path(config.store.path)
    task, tasks = this_task(config.task, config.tasks, os.environ)
    device = pick_device("encode.device", config.encode.device, os.environ)
    dtype = encoder_dtype(config, device)
    planned = read_plan(path)
    shards = list_input_shards(config.dataset) if planned is None else planned
    names = [shard.name for shard in shards] if planned is None else planned.names
    tokenizers = load_tokenizers(config.model, config.dataset.preprocessing.resolution)
    stages = build_stages(config, tokenizers, device, stop)
    stages.selection.refuse_unscanned(names)
    class_names = next((shard.class_names for shard in shards if shard.class_names), ())
    transform = {**stages.decoder.transform(), "dtype": dtype, "class_names": list(class_names)}
    if config.encode.compile:  # other kernels round otherwise
        transform["compile"] = True
    meta = store_meta(tokenizers, transform, stages.text, config.store)
    try:
        create_store(path, meta)
    except OSError as error:
        raise ValueError(f"store.path={path} cannot be written: {error}") from error
    sweep_staging(path / "shards")
    mine = share_of(shards, task, tasks)
    todo = chosen(path, remaining_shards(path, mine), config.only)
    expect_shards(path, names)  # all tasks': `verify` counts them
    write_config(path, config)
    models = ", ".join(f"{column} by {one.recorded.name}" for column, one in tokenizers.items())
    print(f"{models} on {device} in {dtype}")
    if stages.text.arrays:
        rows = known_rows(shards, stages.views) or 10**6  # to reckon with
        print(describe_cost(stages.text, meta, [], rows))
    return Job(names, mine, todo, task, tasks, path), stages


def run(job: Job, stages: Stages, progress: Progress, stop: Event) -> State:
    """Encodes, and reports to the ledger meanwhile; returns how it ended."""
    report = TaskReport(job.store, job.task, job.tasks)
    state: State = "failed"
    try:
        with closing(progress):
            encode_shards(job, stages, progress, report, stop)
        state = "failed" if progress.failed else "finished"
    except Stopped:
        state = "stopped"
    finally:
        report.close(state, progress)
    return state


def encode_shards(
    job: Job, stages: Stages, progress: Progress, report: TaskReport, stop: Event
) -> None:
    """Reads, decodes, encodes and writes the shards to do, all at the same time.

    Raises Stopped soon after `stop` was set, when what was encoded by then is written.
    """
    prepare = preparation(stages.decoder, stages.selection)
    ahead = stages.batch_size // stages.views + 1
    decoded = decode_ahead(job.todo, stages.read, prepare, stages.threads, ahead, stop)
    writer = StoreWriter(job.store, stages.fields, stages.text, progress, report)
    with closing(decoded), writer:
        for batch in progress.waiting(batches(decoded, stages.batch_size)):
            pixels = stacked_pixels(batch, stages.resolutions)
            with progress.phase("device"):
                pending = stages.encoder.submit(pixels) if pixels else None
            writer.put(batch, pending)


def chosen(store: Path, shards: Sequence[InputShard], only: str) -> list[InputShard]:
    """Of the shards to do, those that `only` names."""
    failed = failures(store)
    return [s for s in shards if only == "all" or (s.name in failed) == (only == "failed")]


def write_config(store: Path, config: TokenizeConfig) -> None:
    """The configuration without what is one task's, for those who go on."""
    (store / WORK).mkdir(exist_ok=True)
    with atomic_file(store / WORK / "config.yaml") as temporary:
        temporary.write_text(dump_config(replace(config, task=None, tasks=None, only="all")))


if __name__ == "__main__":
    sys.exit(main())
