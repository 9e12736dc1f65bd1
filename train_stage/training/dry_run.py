"""`muse-train … --dry-run`: what a run would take, before it takes it (steps 5 to 7).

The stores' metadata and the text encoders' configurations are read, and one step is counted
(step_cost.py): no codes and no weights are read, nothing is written, no GPU is needed.
"""

import os
from dataclasses import dataclass

import torch

from train_stage.conditioning.conditioner import make_prompt_encoder
from train_stage.conditioning.prompt_encoder import PromptEncoder
from train_stage.config import TrainConfig
from train_stage.loading.loader import TokenLoader
from train_stage.loading.store_stream import Reading
from train_stage.models.config import tokenizer_of
from train_stage.models.sizes import condition_shapes, count_parameters
from train_stage.models.token_transformer import TokenTransformer
from train_stage.objective.config import ObjectiveFields
from train_stage.objective.mask_schedule import Schedule, get_mask_schedule
from train_stage.objective.soft_targets import topk_columns
from train_stage.training.build_model import make_model
from train_stage.training.config import split_batch
from train_stage.training.loaders import open_sources
from train_stage.training.peak_speed import PEAK_TFLOPS, kind_of
from train_stage.training.process_memory import PEAK, parts_of, process_memory
from train_stage.training.step_cost import Device, Step, StepCost, count_step
from train_stage.training.text_cost import TextCost, count_texts

GPU = "H100"
UTILISATIONS = (0.2, 0.4, 0.6)  # shares of the peak
DRAWS = 100_000  # mask ratios that are averaged


@dataclass
class Plan:
    """A run's step, counted."""

    config: TrainConfig
    loader: TokenLoader
    model: TokenTransformer
    processes: int
    step: Step  # of a process
    cost: StepCost
    texts: list[TextCost]

    @property
    def text_tflop(self) -> float:
        """Operations of the text encoders in a step of all processes."""
        rows = self.loader.global_batch_size
        return rows * sum(text.flops for text in self.texts) / 1e12

    @property
    def tflop(self) -> float:
        """Operations of a step of all processes."""
        each = self.cost.flops + self.cost.update_flops
        return self.processes * each / 1e12 + self.text_tflop

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of a process by name."""
        text, step = sum(text.weights for text in self.texts), self.step
        return process_memory(
            self.cost,
            self.model,
            self.config.training,
            self.processes,
            step.passes,
            step.optimizer,
            text,
        )

    def gpu_hours(self, share: float) -> float:
        """Of the run, if a GPU does that share of its peak."""
        training, rows = self.config.training, self.loader.global_batch_size
        listed = PEAK_TFLOPS[GPU]
        seconds = (self.tflop - self.text_tflop) / getattr(listed, step_kind(self.config))
        for text in self.texts:
            precision = {"bfloat16": "bf16", "float16": "fp16"}.get(text.dtype, "no")
            kind = kind_of(precision, training.enable_tf32)
            seconds += rows * text.flops / 1e12 / getattr(listed, kind)
        return training.max_train_steps * seconds / share / 3600


def describe(config: TrainConfig, device: Device = "cuda") -> str:
    """What would be trained on how much, in which memory and time: several lines.

    device: whose memory is counted. Processes are torchrun's WORLD_SIZE, else one. Raises what
    muse-train raises for stores and options that do not fit.
    """
    plan = make_plan(config, device)
    step, codes = plan.step, codes_of_row(config, plan.loader)
    lines = [
        *describe_stores(config, plan.loader),
        *describe_model(plan),
        f"step        {plan.loader.global_batch_size:,} rows = {plan.processes} processes x "
        f"{step.passes} passes x {step.rows} rows; {step.scored / (step.rows * codes):.0%} of the "
        f"codes are {'scored' if config.training.predicts_all else 'masked'} on average",
        *describe_memory(plan, device),
        *describe_time(plan),
        f"in short    {summary(plan)}",
    ]
    return "\n".join(lines)


def summary(plan: Plan) -> str:
    """The line at the top of a configuration: size, operations, memory, GPU-hours."""
    texts = f", {plan.text_tflop:,.1f} of them of text encoders" if plan.text_tflop else ""
    hours = plan.gpu_hours(0.4)
    size = count_parameters(plan.model) / 1e6
    return (
        f"{size:,.1f} M parameters; {plan.tflop:,.1f} TFLOP a step of "
        f"{plan.loader.global_batch_size:,} rows{texts}; {plan.memory[PEAK] / 1e9:,.1f} GB on each "
        f"of {plan.processes} GPUs; {hours:,.{0 if hours >= 10 else 1}f} GPU-hours for "
        f"{plan.config.training.max_train_steps:,} steps at 40 % of an {GPU}'s peak"
    )


def make_plan(config: TrainConfig, device: Device = "cuda") -> Plan:
    """Opens the stores and counts a step; see describe."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    global_batch, passes = split_batch(config.training, processes)
    loader = open_loader(config, global_batch, processes)
    model, encoder = shape_of_model(config, loader)
    step = plan_step(config, model, loader, encoder, global_batch // (processes * passes), passes)
    texts = count_texts(encoder, config.model.class_prompt is None)
    return Plan(config, loader, model, processes, step, count_step(model, step, device), texts)


def open_loader(config: TrainConfig, global_batch: int, processes: int) -> TokenLoader:
    """The run's loader, in the way of reading that loads no codes beforehand."""
    data, most = config.dataset, config.experiment.max_train_examples
    reading = Reading(data.codes_column, "window", data.window_chunks, data.views, "none")
    sources, seed = open_sources(config), config.training.seed
    return TokenLoader(sources, global_batch, seed, 0, processes, reading, max_rows=most)


def shape_of_model(
    config: TrainConfig, loader: TokenLoader
) -> tuple[TokenTransformer, PromptEncoder | None]:
    """The model of the run, whose weights have no memory, and the text encoders, not yet loaded."""
    store, is_uvit = loader.streams[0].store, config.model.architecture == "uvit"
    meta = torch.device("meta")
    encoder = make_prompt_encoder(config.model, store, is_uvit, meta)
    model = make_model(config, store, loader.largest_class_id, encoder, meta)
    model.set_attention("plain" if config.model.attention == "plain" else "sdpa")
    return model, encoder


def codes_of_row(config: TrainConfig, loader: TokenLoader) -> int:
    """N."""
    height, width = tokenizer_of(loader.streams[0].store.meta, config.dataset.codes_column).grid
    return height * width


def plan_step(
    config: TrainConfig,
    model: TokenTransformer,
    loader: TokenLoader,
    encoder: PromptEncoder | None,
    rows: int,
    passes: int,
) -> Step:
    """The step to count, with as many scored codes as there are on average."""
    training, codes = config.training, codes_of_row(config, loader)
    schedule = get_mask_schedule(config.mask_schedule.schedule, **config.mask_schedule.params)
    masked = expected_masked(schedule, codes, training.min_masking_rate)
    scored = codes if training.predicts_all else masked
    return Step(
        rows,
        codes + bool(getattr(model.config, "num_classes", None)),  # a U-ViT has no class token
        round(rows * scored),
        passes,
        training.mixed_precision,
        config.optimizer.name,
        training.use_ema,
        training.label_smoothing,
        condition_shapes(model, encoder.length) if encoder else {},
        soft_codes(training, loader, config.dataset.codes_column),
        training.self_conditioning_prob * model.config.self_conditioning,
        codes if training.critic else 0,
    )


def soft_codes(training: ObjectiveFields, loader: TokenLoader, codes_column: str) -> int:
    """Codes of a soft target, 0 without."""
    if training.soft_targets != "stored":
        return training.soft_target_codes if training.soft_targets else 0
    name, _ = topk_columns(codes_column)
    return loader.streams[0].store.meta.arrays[name].shape[-1]


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


def describe_model(plan: Plan) -> list[str]:
    """Parameters, by part, and the text encoders beside."""
    listed = ", ".join(f"{name} {n / 1e6:,.2f} M" for name, n in parts_of(plan.model).items())
    lines = [f"model       {count_parameters(plan.model) / 1e6:,.2f} M parameters: {listed}"]
    for text in plan.texts:
        work = f"{text.flops / 1e9:,.1f} GFLOP a row" if text.flops else "not run on rows"
        lines.append(
            f"text        {text.name}: {text.parameters / 1e6:,.2f} M parameters, frozen, in "
            f"{text.dtype}; {work}"
        )
    return lines


def describe_memory(plan: Plan, device: Device) -> list[str]:
    """Memory by kind, and the most at once: activations go as gradients come."""
    lines = [f"memory      of a {'GPU' if device == 'cuda' else 'CPU'}'s process, in tensors:"]
    lines += [f"{size / 1e9:17.3f} GB  {name}" for name, size in plan.memory.items() if size]
    return [*lines, "            beside what libraries take and the allocator leaves unused"]


def describe_time(plan: Plan) -> list[str]:
    """Operations of a step and of the run, and how long that takes if a GPU does its share."""
    steps, processes = plan.config.training.max_train_steps, plan.processes
    kind = step_kind(plan.config)
    peak = processes * getattr(PEAK_TFLOPS[GPU], kind)
    each = [f"{plan.gpu_hours(use) / processes:,.1f} h at {use:.0%}" for use in UTILISATIONS]
    update = processes * plan.cost.update_flops / 1e12
    texts = f", {plan.text_tflop:,.2f} the text encoders'" if plan.text_tflop else ""
    return [
        f"operations  {plan.tflop:,.2f} TFLOP a step, {update:,.2f} of them the optimizer's{texts};"
        f" {plan.tflop * steps * 1e12:.2e} FLOP in {steps:,} steps",
        f"time        {', '.join(each)} of the peak of {processes} {GPU} ({peak:,} TFLOP/s in "
        f"{kind})",
    ]


def step_kind(config: TrainConfig) -> str:
    """In which units of a GPU a step's products are computed."""
    return kind_of(config.training.mixed_precision, config.training.enable_tf32)
