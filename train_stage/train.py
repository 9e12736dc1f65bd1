"""muse-train: trains the transformer on the codes of a token store (steps 5 to 7).

    muse-train config=configs/train/fashion_mnist.yaml dataset.train_store=runs/demo/store
    accelerate launch -m train_stage.train config=…      (several GPUs or nodes)
    muse-train … --dry-run      (parameters, memory and FLOPs a step, without running it)

The same command starts a run and goes on with it. SIGTERM or SIGUSR1 saves and exits with 75;
what cannot be done is refused with one line and 2.
"""

import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.load import dump_config, load_command_config
from train_stage.config import TrainConfig
from train_stage.loading.loader import Batch, TokenLoader
from train_stage.objective.masked_batch import (
    DROPOUT,
    MaskedBatch,
    Sums,
    backward,
    describe_sums,
    mask_batch,
    stream_seed,
)
from train_stage.training.checkpoint import save_checkpoint, save_model
from train_stage.training.dry_run import describe
from train_stage.training.optimizer import lr_factor
from train_stage.training.preemption import EXIT_REFUSED, EXIT_SAVED, StopFlag
from train_stage.training.run_log import RunLog, say
from train_stage.training.setup_run import Run, set_up

EVAL_ROWS = 8192  # the validation loss uses this many rows at most


def main(argv: list[str] | None = None) -> int:
    """Trains; returns 0 when finished, 2 when refused, 75 when stopped by a signal after saving."""
    words = sys.argv[1:] if argv is None else argv
    words = ["experiment.dry_run=true" if word == "--dry-run" else word for word in words]
    config = load_command_config(TrainConfig, words, __doc__ or "")
    try:
        if config.experiment.dry_run:
            print(describe(config))
            return 0
        run = set_up(config)
        finished = train(run)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    run.accelerator.end_training()
    return 0 if finished else EXIT_SAVED


def train(run: Run) -> bool:
    """Steps until max_train_steps; False when a signal stopped it (a checkpoint is written)."""
    config, accelerator = run.config, run.accelerator
    total = config.training.max_train_steps
    start_trackers(run)
    log = RunLog(run.path, run.step, total, accelerator) if accelerator.is_main_process else None
    describe_run(run)
    stop, clock = StopFlag(accelerator), Clock()
    while run.step < total:
        grad_norm = training_step(run, clock)
        if log:
            log.step()
        if run.step % config.experiment.log_every == 0 or run.step == total:
            metrics = collect_metrics(run, clock, grad_norm)
            if log:
                log.write(run.step, metrics)
        number = stop.agreed()
        with clock.paused():
            look_and_save(run, log, number)
        if number and run.step < total:
            say(accelerator, f"signal {number}: saved at step {run.step}, run it again to go on")
            return False
    if accelerator.is_main_process:
        save_final(run)
    if log:
        log.close()
    return True


def look_and_save(run: Run, log: RunLog | None, signal_number: int) -> None:
    """Between steps: validation loss, pictures and checkpoint, each where it is due."""
    config = run.config
    if run.eval_loader is not None and due(run, config.experiment.eval_every):
        loss = {"eval_loss": evaluate_loss(run, run.eval_loader)}
        if log:
            log.write(run.step, loss)
    if run.samples and log and due(run, config.experiment.generate_every):
        with torch.compiler.set_stance("force_eager"):  # its shapes are not those of training
            written = run.samples.write(run.model, run.ema, run.path, run.step)
        log.say(f"pictures: {written}")
    last = run.step == config.training.max_train_steps
    if signal_number or last or due(run, config.experiment.save_every):
        saved = save(run)
        if log:
            log.say(f"checkpoint: {saved}")


def training_step(run: Run, clock: "Clock") -> torch.Tensor:
    """One optimizer step; returns the gradient's norm before clipping."""
    config, accelerator = run.config.training, run.accelerator
    started = time.perf_counter()
    batch = run.loader.batch(0 if config.overfit_one_batch else run.step)
    clock.waited += time.perf_counter() - started
    masked = make_masked(run, batch)
    # every step starts its own random stream, so that resuming needs no generator state
    torch.manual_seed(stream_seed(config.seed, run.step, DROPOUT, accelerator.process_index))
    run.loss_module.train()
    set_learning_rate(run)
    run.sums.merge(backward(run.loss_module, masked, run.passes, accelerator))
    limit = float("inf") if config.max_grad_norm is None else config.max_grad_norm
    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), limit)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(run.model)
    run.step += 1
    clock.images += run.loader.global_batch_size
    return grad_norm


class Clock:
    """Images and seconds since the last log line, pauses left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts a new window now."""
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began


def collect_metrics(run: Run, clock: Clock, grad_norm: torch.Tensor) -> dict[str, Any]:
    """Metrics since the last log line, over all processes; a collective call and a sync point.

    Raises FloatingPointError when the loss is no number any more.
    """
    metrics: dict[str, Any] = describe_sums(all_sums(run).tolist())
    seconds = time.perf_counter() - clock.started
    metrics |= {
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "grad_norm": float(grad_norm),
        "images_per_s": clock.images / seconds,
        "data_wait": clock.waited / seconds,
        "epoch": run.loader.epoch(run.step),
    }
    if run.ema is not None:
        metrics["ema_decay"] = run.ema.last_decay
    run.sums = Sums.zeros(run.accelerator.device)
    clock.restart()
    return metrics


def all_sums(run: Run) -> torch.Tensor:
    """The sums of all processes as one vector. Raises FloatingPointError for NaN or infinity."""
    flat = run.accelerator.reduce(run.sums.flat(), reduction="sum")
    if not flat.isfinite().all():
        raise FloatingPointError(
            f"the loss is not finite at step {run.step}: nothing was saved since the last "
            "checkpoint; lower optimizer.params.learning_rate or training.max_grad_norm"
        )
    return flat


def set_learning_rate(run: Run) -> None:
    """The schedule's rate for this step, in every parameter group."""
    scheduler, params = run.config.lr_scheduler, run.config.lr_scheduler.params
    factor = lr_factor(
        scheduler.scheduler,
        run.step,
        params.warmup_steps,
        run.config.training.max_train_steps,
        params.num_cycles,
        params.power,
        run.learning_rate,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate * factor


@torch.no_grad()
def evaluate_loss(run: Run, loader: TokenLoader) -> float:
    """Mean cross-entropy (nats) over at most EVAL_ROWS rows, with the same masks every time."""
    accelerator = run.accelerator
    sums = Sums.zeros(accelerator.device)
    run.loss_module.eval()
    for step in range(-(-min(loader.rows, EVAL_ROWS) // loader.global_batch_size)):
        for input_ids, labels, positions in make_masked(run, loader.batch(step)).split(run.passes):
            sums.add(run.loss_module(input_ids, labels, positions), labels)
    flat = accelerator.reduce(sums.flat(), reduction="sum").tolist()
    return describe_sums(flat)["cross_entropy"]


def make_masked(run: Run, batch: Batch) -> MaskedBatch:
    """mask_batch for this process of this run."""
    accelerator = run.accelerator
    return mask_batch(
        batch,
        run.model,
        run.config.training,
        run.schedule,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
    )


def due(run: Run, every: int) -> bool:
    """True at steps that are a multiple of `every`; never for 0."""
    return bool(every) and run.step % every == 0


def save(run: Run) -> Path | None:
    """Writes a checkpoint on the main process; the others wait."""
    path, sums, scaler = None, all_sums(run), run.accelerator.scaler
    run.loader.step = run.step
    if run.accelerator.is_main_process:
        state = {
            "optimizer": run.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "sums": sums,
        }
        path = save_checkpoint(
            run.path,
            run.step,
            run.model,
            run.ema,
            run.codes,
            state,
            run.loader.state_dict(),
            dump_config(run.config),
            run.config.experiment.checkpoints_total_limit,
        )
    run.accelerator.wait_for_everyone()
    return path


def save_final(run: Run) -> None:
    """Writes RUN/model, averaged weights where there are any."""
    path = run.path / "model"
    save_model(run.model, run.ema, path, run.codes)
    print(f"model: {path}\nnext: muse-generate model={path} output_dir={run.path / 'generated'}")


def start_trackers(run: Run) -> None:
    """Opens wandb when asked for; a run that goes on keeps its id there."""
    config, accelerator = run.config, run.accelerator
    if config.wandb.mode == "disabled" or not accelerator.is_main_process:
        return
    id_file = run.path / "wandb_id"
    if not id_file.is_file():
        id_file.write_text(uuid.uuid4().hex[:12])
    options = {
        "id": id_file.read_text(),
        "resume": "allow",
        "name": config.experiment.name or run.path.name,
        "entity": config.wandb.entity,
        "mode": config.wandb.mode,
        "dir": str(run.path),
    }
    accelerator.init_trackers(config.experiment.project, asdict(config), {"wandb": options})


def describe_run(run: Run) -> None:
    """Says what is about to happen."""
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    loader, accelerator = run.loader, run.accelerator
    say(
        accelerator,
        f"{parameters / 1e6:.2f} M parameters, {loader.rows:,} rows, global batch "
        f"{loader.global_batch_size} = {accelerator.num_processes} processes x {run.passes} "
        f"passes, {accelerator.device}, {accelerator.mixed_precision} mixed precision; "
        f"writes to {run.path}",
    )


if __name__ == "__main__":
    sys.exit(main())
