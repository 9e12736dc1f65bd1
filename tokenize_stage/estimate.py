"""muse-tokenize estimate: GPU-hours, time, bytes and money for a data set, from a measurement.

    muse-tokenize estimate config=configs/tokenize/imagenet_f16.yaml \\
        dataset.shards_path_or_url=imagenet/train estimate.gpus=8 estimate.price=2.5
    muse-tokenize estimate config=… estimate.gpu=H100     # no GPU here: a computed bound

Takes the options of `muse-tokenize encode`. It reads the first input shard, times reading,
decoding, encoding and writing, each alone for estimate.seconds, and says which of them bounds the
run. Nothing is left on the disk. Exit status: 0, or 2 where nothing could be measured.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event

import torch

from configs.load import load_command_config
from tokenize_stage.cost.config import EstimateConfig
from tokenize_stage.cost.forecast import Measured, forecast
from tokenize_stage.cost.measure import (
    Decoded,
    Input,
    decode_input,
    read_input,
    time_encoder,
    time_text,
    write_rows,
)
from tokenize_stage.cost.report import describe
from tokenize_stage.cost.roofline import GPUS, encoder_operations, images_per_s
from tokenize_stage.pipeline.encoder import Encoder
from tokenize_stage.pipeline.stages import Stages, build_stages, encoder_dtype
from tokenize_stage.pipeline.tokenizers import ColumnTokenizer, load_tokenizers, store_meta
from tokenize_stage.process import pick_device, refuse
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.text.cost import row_bytes


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the forecast, returns the exit status."""
    config = load_command_config(EstimateConfig, argv, __doc__ or "")
    try:
        print(estimate(config))
    except (ValueError, OSError) as error:
        return refuse(error)
    return 0


def estimate(config: EstimateConfig) -> str:
    """All that is printed. Raises ValueError or OSError where nothing can be measured."""
    options = config.estimate
    device = pick_device("encode.device", config.encode.device, os.environ)
    shards = list_input_shards(config.dataset)
    tokenizers = load_tokenizers(config.model, config.dataset.preprocessing.resolution)
    bounds = computed_rates(config, tokenizers) if options.gpu != "here" else {}
    stages = build_stages(config, tokenizers, device, Event())
    counts = [shard.sample_count for shard in shards]
    read = read_input(stages, shards[0], options.seconds, options.images is None and None in counts)
    decoded = decode_input(stages, shards[0], read, options.seconds)
    rates = bounds or time_variants(config, stages, decoded, device)
    meta = store_meta(tokenizers, stages.decoder.transform(), stages.text, config.store)
    place = existing_parent(Path(config.store.path))
    written, table_bytes = write_rows(stages, meta, decoded.rows, place)
    texts = time_text(stages, decoded.rows, options.seconds / 4)
    on_device = bool(stages.text.encoders)
    measured = Measured(
        samples_per_s_read=read.samples_per_s,
        core_s_per_sample=decoded.core_s_per_sample,
        rows_per_s_encoded=next(iter(rates.values())),
        rows_per_s_written=written,
        texts_per_s=None if bounds and on_device else texts,
        text_on_device=on_device,
        accepted=decoded.accepted * read.readable / read.seen,
        views=stages.views,
        bytes_per_sample=read.bytes_per_sample,
        cores=min(stages.threads, len(os.sched_getaffinity(0))),
    )
    captions = [row.sample.caption for row in decoded.rows]
    sizes = row_bytes(stages.text, meta, captions) | {"rows.parquet": table_bytes}
    images, basis = count_images(options.images, counts, read)
    result = forecast(measured, images, options.gpus, sizes, options.cores, options.price)
    about = f"{shards[0].source}: {read.seen:,} samples read, {len(decoded.rows):,} rows made"
    if bounds and on_device:
        about += f"\nnot counted: text encoders, whose speed on an {options.gpu} is not known"
    return f"{about}\n\n{describe(result, measured, rates, basis, options.gpus)}"


def count_images(given: int | None, counts: Sequence[int | None], read: Input) -> tuple[int, str]:
    """(Images in the data set, on what that is based); counts: of the shards, where known."""
    known = [count for count in counts if count is not None]
    if given is not None:
        return given, "as given"
    if len(known) == len(counts):
        return sum(known), "counted"
    unknown = len(counts) - len(known)
    total = sum(known) + unknown * read.seen
    return total, f"the first shard's {read.seen:,} in each of {unknown:,}"


def time_variants(
    config: EstimateConfig, stages: Stages, decoded: Decoded, device: torch.device
) -> dict[str, float]:
    """Way to encode -> rows a second on this device; the configured way first."""
    seconds = config.estimate.seconds
    configured = f"{encoder_dtype(config, device)} on {device_name(device)}"
    configured += ", compiled" * config.encode.compile
    rates = {configured: time_encoder(stages.encoder, stages, decoded.rows, seconds)}
    for name in config.estimate.variants:
        tokenizers = load_tokenizers(config.model, config.dataset.preprocessing.resolution)
        dtype = encoder_dtype(config, device) if name == "compile" else name
        encoder = Encoder(
            {column: one.model for column, one in tokenizers.items()},
            {column: one.resolution for column, one in tokenizers.items()},
            device,
            getattr(torch, dtype),
            stages.batch_size,
            config.encode.compile or name == "compile",
            soft={column: one.soft for column, one in tokenizers.items() if one.soft},
        )
        rates[name] = time_encoder(encoder, stages, decoded.rows, seconds)
    return rates


def computed_rates(
    config: EstimateConfig, tokenizers: Mapping[str, ColumnTokenizer]
) -> dict[str, float]:
    """Rows a second of all tokenizers on a GPU that is not here, and what they are called."""
    options, is_half = config.estimate, config.encode.dtype != "float32"
    seconds = {False: 0.0, True: 0.0}  # of one row: each operation alone, and fused
    for one in tokenizers.values():
        dtype = torch.float16 if is_half else torch.float32
        operations = encoder_operations(one.model, one.resolution, dtype)
        for is_fused in seconds:
            seconds[is_fused] += 1 / images_per_s(operations, GPUS[options.gpu], is_half, is_fused)
    ways = {True: "compiled", False: "op by op"}
    first = config.encode.compile
    return {
        f"{options.gpu} {ways[is_fused]}, computed: {options.reached:.0%} of "
        f"{1 / seconds[is_fused]:,.0f}, not measured": options.reached / seconds[is_fused]
        for is_fused in (first, not first)
    }


def device_name(device: torch.device) -> str:
    """What people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, no GPU"


def existing_parent(path: Path) -> Path:
    """The folder itself, or the first above it that exists: the disk on which it will be."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


if __name__ == "__main__":
    sys.exit(main())
