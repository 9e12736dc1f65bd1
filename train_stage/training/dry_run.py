"""`muse-train … --dry-run`: what a run would take, before it takes it (steps 5 to 7).

The stores' metadata is read and one step is counted (step_cost.py): no codes are read, nothing is
written, no GPU is needed.
"""

import os

import torch
from torch import nn

from train_stage.conditioning.conditioner import make_prompt_encoder
from train_stage.config import TrainConfig
from train_stage.loading.loader import TokenLoader
from train_stage.loading.store_stream import Reading
from train_stage.models.config import tokenizer_of
from train_stage.models.sizes import condition_shapes, count_parameters
from train_stage.models.token_transformer import TokenTransformer
from train_stage.objective.mask_schedule import Schedule, get_mask_schedule
from train_stage.training.build_model import make_model
from train_stage.training.config import split_batch
from train_stage.training.loaders import open_sources
from train_stage.training.peak_speed import PEAK_TFLOPS, kind_of
from train_stage.training.step_cost import Device, Step, StepCost, count_step

GPU = "H100"
UTILISATIONS = (0.2, 0.4, 0.6)  # shares of the peak
DRAWS = 100_000  # mask ratios that are averaged


def describe(config: TrainConfig, device: Device = "cuda") -> str:
    """What would be trained on how much, in which memory and time: several lines.

    device: whose memory is counted. Processes are torchrun's WORLD_SIZE, else one. Raises what
    muse-train raises for stores and options that do not fit.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    global_batch, passes = split_batch(config.training, processes)
    loader = open_loader(config, global_batch, processes)
    model = shape_of_model(config, loader)
    step = plan_step(config, model, global_batch // (processes * passes), passes)
    cost = count_step(model, step, device)
    lines = [
        *describe_stores(config, loader),
        *describe_model(model),
        f"step        {global_batch:,} rows = {processes} processes x {passes} passes x "
        f"{step.rows} rows; {step.scored / (step.rows * model.config.num_vq_tokens):.0%} of the "
        "codes are masked on average",
        *describe_memory(cost, step, device, processes),
        *describe_time(cost, config, processes),
    ]
    return "\n".join(lines)


def open_loader(config: TrainConfig, global_batch: int, processes: int) -> TokenLoader:
    """The run's loader, in the way of reading that loads no codes beforehand."""
    data, most = config.dataset, config.experiment.max_train_examples
    reading = Reading(data.codes_column, "window", data.window_chunks, data.views, "none")
    sources, seed = open_sources(config), config.training.seed
    return TokenLoader(sources, global_batch, seed, 0, processes, reading, max_rows=most)


def shape_of_model(config: TrainConfig, loader: TokenLoader) -> TokenTransformer:
    """The model of the run; its weights have no memory."""
    store, is_uvit = loader.streams[0].store, config.model.architecture == "uvit"
    meta = torch.device("meta")
    encoder = make_prompt_encoder(config.model, store, is_uvit, meta)
    model = make_model(config, store, loader.largest_class_id, encoder, meta)
    model.set_attention("plain" if config.model.attention == "plain" else "sdpa")
    return model


def plan_step(config: TrainConfig, model: TokenTransformer, rows: int, passes: int) -> Step:
    """The step to count, with as many masked codes as there are on average."""
    training, codes = config.training, model.config.num_vq_tokens
    schedule = get_mask_schedule(config.mask_schedule.schedule, **config.mask_schedule.params)
    return Step(
        rows,
        codes + bool(model.config.num_classes),
        round(rows * expected_masked(schedule, codes, training.min_masking_rate)),
        passes,
        training.mixed_precision,
        config.optimizer.name,
        training.use_ema,
        training.label_smoothing,
        condition_shapes(model),
    )


def expected_masked(schedule: Schedule, codes: int, min_masking_rate: float) -> float:
    """How many of a row's codes draw_mask hides on average."""
    ratio = schedule((torch.arange(DRAWS) + 0.5) / DRAWS).clip(min_masking_rate)
    return (codes * ratio).round().clamp(min=1).mean().item()


def describe_stores(config: TrainConfig, loader: TokenLoader) -> list[str]:
    """Rows and codes of the stores, and how often the run goes through them."""
    stores = [stream.store for stream in loader.streams]
    tokenizer = tokenizer_of(stores[0].meta, config.dataset.codes_column)
    height, width = tokenizer.grid
    steps = config.training.max_train_steps
    return [
        f"store       {', '.join(str(store.path) for store in stores)}: {loader.rows:,} rows of "
        f"{height} x {width} codes in [0, {tokenizer.codebook_size}), by {tokenizer.name}",
        f"epoch       {loader.rows / loader.global_batch_size:,.1f} steps; {steps:,} steps are "
        f"{loader.epoch(steps):,.1f} epochs",
    ]


def describe_model(model: TokenTransformer) -> list[str]:
    """Parameters, by part."""
    parts = {
        "embeddings": model.get_submodule("embed"),
        "layers": nn.ModuleList(model.layers()),
        "head": getattr(model, "mlm_layer", None) or model.get_submodule("to_logits"),
    }
    counts = {name: count_parameters(part) for name, part in parts.items()}
    total = count_parameters(model)
    counts["other"] = total - sum(counts.values())
    listed = ", ".join(f"{name} {count / 1e6:,.2f} M" for name, count in counts.items())
    return [f"model       {total / 1e6:,.2f} M parameters: {listed}"]


def describe_memory(cost: StepCost, step: Step, device: Device, processes: int) -> list[str]:
    """Memory by kind, and the most at once: activations go as gradients come."""
    buckets = cost.gradients if processes > 1 else 0  # DistributedDataParallel's
    sizes = {
        "weights": cost.weights,
        "gradients": cost.gradients,
        "gradients on their way to other processes": buckets,
        f"{step.optimizer} state": cost.optimizer,
        "moving average": cost.ema,
        "activations of a pass": cost.activations,
        "at most at once": cost.peak + buckets,
    }
    lines = [f"memory      of a {'GPU' if device == 'cuda' else 'CPU'}'s process, in tensors:"]
    lines += [f"{size / 1e9:17.3f} GB  {name}" for name, size in sizes.items() if size]
    return [*lines, "            beside what libraries take and the allocator leaves unused"]


def describe_time(cost: StepCost, config: TrainConfig, processes: int) -> list[str]:
    """Operations of a step and of the run, and how long that takes if a GPU does its share."""
    training = config.training
    kind = kind_of(training.mixed_precision, training.enable_tf32)
    step = processes * (cost.flops + cost.update_flops) / 1e12
    total, peak = step * training.max_train_steps, processes * getattr(PEAK_TFLOPS[GPU], kind)
    hours = ", ".join(f"{total / (peak * use) / 3600:,.1f} h at {use:.0%}" for use in UTILISATIONS)
    update = processes * cost.update_flops / 1e12
    return [
        f"operations  {step:,.2f} TFLOP a step, {update:,.2f} of them the optimizer's; "
        f"{total * 1e12:.2e} FLOP in {training.max_train_steps:,} steps",
        f"time        {hours} of the peak of {processes} {GPU} ({peak:,} TFLOP/s in {kind})",
    ]
