"""Building a training run from its configuration: store, model, optimizer, and where to go on."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_wandb_available
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

from configs.load import ConfigError, changed_keys, dump_config
from storage.atomic import atomic_file
from storage.file_cache import CacheOptions
from storage.pretrained import find_model, load_strictly, read_weights
from storage.reader import TokenStore
from storage.schema import StoreMismatch
from train_stage.config import TrainConfig, split_batch, tokenizer_of, transformer_fields
from train_stage.loading.loader import Source, TokenLoader
from train_stage.loading.store_stream import Reading
from train_stage.models.transformer import MaskGitTransformer
from train_stage.objective.loss import MaskedLoss
from train_stage.objective.mask_schedule import Schedule, get_mask_schedule
from train_stage.objective.masked_batch import Sums
from train_stage.training.checkpoint import choose_checkpoint, load_checkpoint
from train_stage.training.ema import EMA
from train_stage.training.optimizer import make_optimizer
from train_stage.training.run_log import say
from train_stage.training.samples import SampleWriter


@dataclass
class Run:
    """Everything of a training run that lives from step to step."""

    config: TrainConfig
    path: Path
    accelerator: Accelerator
    loader: TokenLoader
    eval_loader: TokenLoader | None
    model: MaskGitTransformer
    loss_module: nn.Module  # MaskedLoss over the model, as accelerate wrapped it
    optimizer: Optimizer  # as accelerate wrapped it
    learning_rate: float  # at the peak of the schedule
    ema: EMA | None
    schedule: Schedule
    passes: int  # forward passes per step and process
    samples: SampleWriter | None
    codes: dict[str, Any]  # what codes.json beside the weights says
    sums: Sums  # since the last log line
    step: int = 0


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices, processes and mixed precision, from the launcher's environment.

    Without a CUDA GPU it runs on the CPU. Raises ValueError for what cannot be had here.
    """
    has_gpu = torch.cuda.is_available()
    if config.training.mixed_precision == "fp16" and not has_gpu:
        raise ValueError("training.mixed_precision=fp16 needs a GPU; on a CPU: bf16 or no")
    if config.wandb.mode != "disabled" and not is_wandb_available():
        raise ValueError(f"wandb.mode={config.wandb.mode}, but wandb is missing: pip install wandb")
    if config.training.enable_tf32:
        torch.set_float32_matmul_precision("high")
    return Accelerator(
        cpu=not has_gpu,
        mixed_precision=config.training.mixed_precision,
        log_with=None if config.wandb.mode == "disabled" else "wandb",
        project_dir=config.experiment.output_dir,
    )


def set_up(config: TrainConfig) -> Run:
    """Opens the store, builds model and optimizer, resumes; refuses what does not fit."""
    accelerator = make_accelerator(config)
    path = Path(config.experiment.output_dir)
    checkpoint = choose_checkpoint(path, config.experiment.resume_from_checkpoint)
    sources = open_sources(config)
    store = sources[0].store
    tokenizer = tokenizer_of(store.meta, config.dataset.codes_column)
    for source in sources:
        if missing := source.store.missing_shards():
            say(accelerator, f"warning: {source.store.path} lacks {len(missing)} shards")
    global_batch, passes = split_batch(config.training, accelerator.num_processes)
    schedule = get_mask_schedule(config.mask_schedule.schedule, **config.mask_schedule.params)
    most = config.experiment.max_train_examples
    loader = make_loader(config, sources, global_batch, accelerator, most)
    model = make_model(config, store, loader).to(accelerator.device)
    ema = EMA(model, **asdict(config.training.ema)) if config.training.use_ema else None
    params = config.optimizer.params
    rate = params.learning_rate * (global_batch / 256 if params.scale_lr else 1.0)
    betas = (params.beta1, params.beta2)
    optimizer = make_optimizer(
        model, config.optimizer.name, rate, betas, params.weight_decay, params.epsilon
    )
    loss_module = MaskedLoss(model, config.training.label_smoothing)
    if config.training.compile:
        loss_module.compile_parts()
    loss_module, optimizer = accelerator.prepare(loss_module, optimizer)
    samples = None
    if config.experiment.generate_every and accelerator.is_main_process:
        samples = SampleWriter(config, store, accelerator.device)
    run = Run(
        config=config,
        path=path,
        accelerator=accelerator,
        loader=loader,
        eval_loader=make_eval_loader(config, store, model, global_batch, accelerator),
        model=model,
        loss_module=loss_module,
        optimizer=optimizer,
        learning_rate=rate,
        ema=ema,
        schedule=schedule,
        passes=passes,
        samples=samples,
        codes={
            "tokenizer": asdict(tokenizer),
            "class_names": store.meta.transform.get("class_names") or [],
        },
        sums=Sums.zeros(accelerator.device),
    )
    path.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        resume(run, checkpoint)
    same_step_everywhere(run)
    if accelerator.is_main_process:
        with atomic_file(path / "config.yaml") as temporary:
            temporary.write_text(dump_config(config))
    return run


def open_sources(config: TrainConfig) -> list[Source]:
    """The stores to train on: the one of dataset.train_store, or the mixture's."""
    data = config.dataset
    if data.train_store is not None:
        return [Source(open_store(config, data.train_store), filter=data.filter)]
    if not data.mixture:
        raise ConfigError("dataset.train_store is missing: the token store to train on")
    return [
        Source(open_store(config, entry.store), entry.weight, entry.repeat, entry.filter)
        for entry in data.mixture
    ]


def open_store(config: TrainConfig, location: str) -> TokenStore:
    """A store, with the configured cache if it is remote."""
    return TokenStore(location, CacheOptions(max_bytes=int(config.dataset.cache_gb * 2**30)))


def make_loader(
    config: TrainConfig,
    sources: list[Source],
    global_batch: int,
    accelerator: Accelerator,
    max_rows: int | None,
) -> TokenLoader:
    """A loader over the stores for this process; codes travel narrow to a GPU."""
    data = config.dataset
    return TokenLoader(
        sources,
        global_batch,
        config.training.seed,
        accelerator.process_index,
        accelerator.num_processes,
        Reading(data.codes_column, data.shuffle, data.window_chunks, data.views, data.preload),
        max_rows=max_rows,
        narrow=accelerator.device.type == "cuda",
        device=accelerator.device,
        quiet=not accelerator.is_main_process,
    )


def make_eval_loader(
    config: TrainConfig,
    store: TokenStore,
    model: MaskGitTransformer,
    global_batch: int,
    accelerator: Accelerator,
) -> TokenLoader | None:
    """A loader over the evaluation store: same tokenizer, same grid, same classes."""
    if config.dataset.eval_store is None:
        return None
    other, column = open_store(config, config.dataset.eval_store), config.dataset.codes_column
    ours, theirs = tokenizer_of(store.meta, column), tokenizer_of(other.meta, column)
    for name in ("fingerprint", "grid"):
        if getattr(ours, name) != getattr(theirs, name):
            found = f"{getattr(theirs, name)}, {store.path} has {getattr(ours, name)}"
            raise StoreMismatch(f"{other.path}: the tokenizer's {name} is {found}")
    if other.meta.transform.get("class_names") != store.meta.transform.get("class_names"):
        raise StoreMismatch(f"{other.path} and {store.path} number other classes")
    loader = make_loader(config, [Source(other)], global_batch, accelerator, None)
    if loader.largest_class_id >= (model.config.num_classes or 0):
        found = f"class ids up to {loader.largest_class_id}"
        raise StoreMismatch(f"{other.path} has {found}, the model {model.config.num_classes}")
    return loader


def make_model(config: TrainConfig, store: TokenStore, loader: TokenLoader) -> MaskGitTransformer:
    """The transformer that fits the store, with random or given weights."""
    fields = transformer_fields(
        config.model.transformer_given(),
        store.meta,
        config.dataset.codes_column,
        loader.largest_class_id,
    )
    torch.manual_seed(config.training.seed)
    model = MaskGitTransformer(**fields)
    if config.model.pretrained_model_path is not None:
        folder = find_model(config.model.pretrained_model_path)
        load_strictly(model, read_weights(folder), str(folder))
    model.gradient_checkpointing = config.model.gradient_checkpointing
    model.set_attention(config.model.attention)
    return model


def resume(run: Run, checkpoint: Path) -> None:
    """Goes to where a checkpoint was written; says which options have changed since."""
    accelerator = run.accelerator
    state = load_checkpoint(checkpoint, run.model, run.ema)
    run.loader.load_state_dict(state["loader"], run.config.dataset.accept_changes)
    run.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if accelerator.is_main_process:  # the sums of all processes are kept by the first
        run.sums = Sums.from_flat(state["sums"].to(accelerator.device))
    run.step = state["global_step"]
    say(accelerator, f"going on from {checkpoint} (step {run.step})")
    before = OmegaConf.load(checkpoint / "config.yaml")
    for key, old, new in changed_keys(before, OmegaConf.create(dump_config(run.config))):
        say(accelerator, f"  changed: {key} was {old}, is now {new}")


def same_step_everywhere(run: Run) -> None:
    """Refuses processes that found different checkpoints."""
    steps = run.accelerator.gather(torch.tensor([run.step], device=run.accelerator.device))
    if len(set(steps.tolist())) > 1:
        raise ValueError(
            f"the processes would start from steps {sorted(set(steps.tolist()))}: "
            f"experiment.output_dir={run.path} must be a folder that all nodes share"
        )
