"""Building a training run from its configuration: store, model, optimizer, and where to go on."""

import os
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from configs.load import ConfigError, dump_config
from storage.atomic import atomic_file
from storage.reader import TokenStore
from train_stage.conditioning.conditioner import Conditioner, make_prompt_encoder
from train_stage.config import TrainConfig
from train_stage.loading.loader import Source
from train_stage.models.config import tokenizer_of
from train_stage.models.token_transformer import TokenTransformer
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.objective.soft_targets import topk_columns
from train_stage.objective.sums import Sums
from train_stage.training.build_model import make_model
from train_stage.training.config import split_batch
from train_stage.training.ema import EMA
from train_stage.training.loaders import (
    largest_class_id,
    make_eval_loader,
    make_loader,
    open_sources,
)
from train_stage.training.loss_module import make_loss
from train_stage.training.optimizer import make_optimizer
from train_stage.training.parallel import check_launch, is_sharded, place
from train_stage.training.resume import find_start, resume
from train_stage.training.run import Run
from train_stage.training.run_log import say
from train_stage.training.samples import SampleWriter
from train_stage.training.trackers import check_trackers
from train_stage.training.whole_step import see_whole_weights


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices, processes and mixed precision, from the launcher's environment.

    Without a CUDA GPU it runs on the CPU. Raises ValueError for what cannot be had here.
    """
    has_gpu = torch.cuda.is_available()
    check_launch(config, has_gpu)
    check_trackers(config)
    if config.training.enable_tf32:
        torch.set_float32_matmul_precision("high")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if config.training.parallel == "fsdp" and config.training.fsdp.cpu_offload and processes > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl")  # shards meet on the host, too
    return Accelerator(
        cpu=not has_gpu,
        mixed_precision=config.training.mixed_precision,
        project_dir=config.experiment.output_dir,
    )


def set_up(config: TrainConfig) -> Run:
    """Opens the store, builds model and optimizer, resumes; refuses what does not fit."""
    accelerator = make_accelerator(config)
    device, path = accelerator.device, Path(config.experiment.output_dir)
    checkpoint = find_start(path, config.experiment.resume_from_checkpoint)
    sources = open_sources(config)
    store = sources[0].store
    say_missing(accelerator, sources)
    tokenizer = tokenizer_of(store.meta, config.dataset.codes_column)
    global_batch, passes = split_batch(config.training, accelerator.num_processes)
    is_uvit = config.model.architecture == "uvit"
    encoder = make_prompt_encoder(config.model, store, is_uvit, device)
    model = make_model(config, store, largest_class_id(sources), encoder).to(device)
    conditioner = None
    if encoder is not None:
        conditioner = Conditioner(encoder, config.model, store, is_uvit, device)
    columns = columns_of(config, store, conditioner)
    most = config.experiment.max_train_examples
    loader = make_loader(config, sources, global_batch, accelerator, most, columns)
    loss_module = place(make_loss(config, model, tokenizer, device), accelerator, config.training)
    optimizer, rate = set_up_optimizer(config, model, global_batch)
    samples = None
    if config.experiment.generate_every and accelerator.is_main_process:
        samples = SampleWriter(config, store, device, conditioner)
    run = Run(
        config=config,
        path=path,
        accelerator=accelerator,
        loader=loader,
        eval_loader=make_eval_loader(config, store, model, global_batch, accelerator, columns),
        model=model,
        loss_module=loss_module,
        optimizer=accelerator.prepare(optimizer),
        learning_rate=rate,
        ema=EMA(model, **asdict(config.training.ema)) if config.training.use_ema else None,
        schedule=get_mask_schedule(config.mask_schedule.schedule, **config.mask_schedule.params),
        passes=passes,
        samples=samples,
        conditioner=conditioner,
        codes={
            "tokenizer": asdict(tokenizer),
            "class_names": store.meta.transform.get("class_names") or [],
            **({"condition": conditioner.record()} if conditioner else {}),
        },
        sums=Sums.zeros(device),
    )
    path.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        resume(run, checkpoint)
    if accelerator.is_main_process:
        with atomic_file(path / "config.yaml") as temporary:
            temporary.write_text(dump_config(config))
    return run


def say_missing(accelerator: Accelerator, sources: list[Source]) -> None:
    """A store is trained on without the shards that it lacks, but not silently."""
    for source in sources:
        if missing := source.store.missing_shards():
            say(accelerator, f"warning: {source.store.path} lacks {len(missing)} shards")


def columns_of(
    config: TrainConfig, store: TokenStore, conditioner: Conditioner | None
) -> list[str]:
    """What the loader reads beside codes and classes. Raises ConfigError for no soft codes."""
    targets = config.training.soft_targets == "stored"
    columns = topk_columns(config.dataset.codes_column) if targets else ()
    if lacking := [name for name in columns if name not in store.meta.arrays]:
        raise ConfigError(
            f"training.soft_targets=stored: {store.path} has no {lacking[0]}; muse-tokenize with "
            "model.vq_model.topk=… makes it, and soft_targets=recomputed needs none"
        )
    return [*columns, *(conditioner.columns if conditioner else ())]


def set_up_optimizer(
    config: TrainConfig, model: TokenTransformer, global_batch: int
) -> tuple[Optimizer, float]:
    """The optimizer of the model as it is placed, and the peak of its rate."""
    params = config.optimizer.params
    rate = params.learning_rate * (global_batch / 256 if params.scale_lr else 1.0)
    betas = (params.beta1, params.beta2)
    optimizer = make_optimizer(
        model, config.optimizer.name, rate, betas, params.weight_decay, params.epsilon
    )
    if is_sharded(model):
        see_whole_weights(optimizer)
    return optimizer, rate
