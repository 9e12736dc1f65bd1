"""Building a training run from its configuration: store, model, optimizer, and where to go on."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from configs.load import dump_config
from storage.atomic import atomic_file
from storage.pretrained import find_model, load_strictly, read_weights
from storage.reader import TokenStore
from storage.schema import StoreMismatch
from train_stage.checkpoint import choose_checkpoint, load_checkpoint
from train_stage.config import TrainConfig, split_batch, transformer_fields
from train_stage.ema import EMA
from train_stage.loader import TokenLoader
from train_stage.loss import MaskedLoss
from train_stage.mask_schedule import Schedule, get_mask_schedule
from train_stage.optimizer import make_optimizer
from train_stage.samples import SampleWriter
from train_stage.transformer import MaskGitTransformer


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
    step: int = 0


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices, processes and mixed precision, from the launcher's environment."""
    if config.training.enable_tf32:
        torch.set_float32_matmul_precision("high")
    return Accelerator(
        mixed_precision=config.training.mixed_precision,
        log_with=None if config.wandb.mode == "disabled" else "wandb",
        project_dir=config.experiment.output_dir,
    )


def set_up(config: TrainConfig, accelerator: Accelerator) -> Run:
    """Opens the store, builds model and optimizer, resumes; refuses what does not fit."""
    path = Path(config.experiment.output_dir)
    path.mkdir(parents=True, exist_ok=True)
    checkpoint = choose_checkpoint(path, config.experiment.resume_from_checkpoint)
    store = TokenStore(config.dataset.train_store)
    global_batch, passes = split_batch(config.training, accelerator.num_processes)
    loader = make_loader(config, store, global_batch, accelerator)
    eval_loader = make_eval_loader(config, store, global_batch, accelerator)
    model = make_model(config, store, loader).to(accelerator.device)
    ema = EMA(model, **asdict(config.training.ema)) if config.training.use_ema else None
    params = config.optimizer.params
    rate = params.learning_rate * (global_batch / 256 if params.scale_lr else 1.0)
    betas = (params.beta1, params.beta2)
    optimizer = make_optimizer(
        model, config.optimizer.name, rate, betas, params.weight_decay, params.epsilon
    )
    loss_module = MaskedLoss(model, config.training.label_smoothing)
    loss_module, optimizer = accelerator.prepare(loss_module, optimizer)
    samples = None
    if config.experiment.generate_every and accelerator.is_main_process:
        samples = SampleWriter(config, store, accelerator.device)
    run = Run(
        config=config,
        path=path,
        accelerator=accelerator,
        loader=loader,
        eval_loader=eval_loader,
        model=model,
        loss_module=loss_module,
        optimizer=optimizer,
        learning_rate=rate,
        ema=ema,
        schedule=get_mask_schedule(config.mask_schedule.schedule, **config.mask_schedule.params),
        passes=passes,
        samples=samples,
    )
    if checkpoint is not None:
        resume(run, checkpoint)
    elif accelerator.is_main_process:
        with atomic_file(path / "config.yaml") as temporary:
            temporary.write_text(dump_config(config))
    return run


def make_loader(
    config: TrainConfig, store: TokenStore, global_batch: int, accelerator: Accelerator
) -> TokenLoader:
    """A loader over `store` for this process."""
    return TokenLoader(
        store,
        global_batch,
        config.training.seed,
        accelerator.process_index,
        accelerator.num_processes,
        config.dataset.codes_column,
        config.experiment.max_train_examples,
    )


def make_eval_loader(
    config: TrainConfig, store: TokenStore, global_batch: int, accelerator: Accelerator
) -> TokenLoader | None:
    """A loader over the evaluation store, which must come from the same tokenizer."""
    if config.dataset.eval_store is None:
        return None
    other, column = TokenStore(config.dataset.eval_store), config.dataset.codes_column
    if other.meta.tokenizers[column].fingerprint != store.meta.tokenizers[column].fingerprint:
        raise StoreMismatch(f"{other.path} and {store.path} come from different tokenizers")
    return make_loader(config, other, global_batch, accelerator)


def make_model(config: TrainConfig, store: TokenStore, loader: TokenLoader) -> MaskGitTransformer:
    """The transformer that fits the store, with random or given weights."""
    fields = transformer_fields(
        config.model.transformer, store.meta, config.dataset.codes_column, loader.largest_class_id
    )
    torch.manual_seed(config.training.seed)
    model = MaskGitTransformer(**fields)
    if config.model.pretrained_model_path is not None:
        folder = find_model(config.model.pretrained_model_path)
        load_strictly(model, read_weights(folder), str(folder))
    model.gradient_checkpointing = config.model.gradient_checkpointing
    return model


def resume(run: Run, checkpoint: Path) -> None:
    """Goes to where a checkpoint was written."""
    state = load_checkpoint(checkpoint, run.model, run.ema)
    run.loader.load_state_dict(state["loader"])
    run.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step = state["global_step"]
    run.accelerator.print(f"going on from {checkpoint} (step {run.step})")
