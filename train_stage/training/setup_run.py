"""Building a training run from its configuration: store, model, optimizer, and where to go on."""

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import is_wandb_available

from configs.load import dump_config
from storage.atomic import atomic_file
from train_stage.config import TrainConfig
from train_stage.models.config import tokenizer_of
from train_stage.objective.loss import MaskedLoss
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.objective.sums import Sums
from train_stage.training.build_model import make_model
from train_stage.training.checkpoint import choose_checkpoint
from train_stage.training.config import split_batch
from train_stage.training.ema import EMA
from train_stage.training.loaders import make_eval_loader, make_loader, open_sources
from train_stage.training.optimizer import make_optimizer
from train_stage.training.resume import resume, same_step_everywhere
from train_stage.training.run import Run
from train_stage.training.run_log import say
from train_stage.training.samples import SampleWriter


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
