"""Steps, and what comes between them: log, validation, pictures, checkpoints, signals."""

import torch

from train_stage.training.clock import Clock
from train_stage.training.metrics import collect_metrics
from train_stage.training.preemption import StopFlag
from train_stage.training.run import Run, due
from train_stage.training.run_log import RunLog, say
from train_stage.training.saving import save, save_final
from train_stage.training.step import training_step
from train_stage.training.trackers import describe_run, start_trackers
from train_stage.training.validation import evaluate_loss


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
