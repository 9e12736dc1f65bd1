"""Steps, and what comes between them: log, validation, pictures, checkpoints, signals."""

import torch

from train_stage.training.agreement import Agreement
from train_stage.training.clock import Clock
from train_stage.training.metrics import collect_metrics, step_work
from train_stage.training.parallel import whole_model
from train_stage.training.preemption import SIGNAL
from train_stage.training.run import Run, due
from train_stage.training.run_log import RunLog, say
from train_stage.training.saving import SAVE, TROUBLE, Saver, save_final
from train_stage.training.step import training_step
from train_stage.training.trackers import describe_run, start_trackers, track_picture
from train_stage.training.validation import evaluate

STOP = TROUBLE + 1  # more urgent than what a Saver wishes


def train(run: Run) -> bool:
    """Steps until max_train_steps; False when a signal stopped it (a checkpoint is written)."""
    config, accelerator = run.config, run.accelerator
    total = config.training.max_train_steps
    if run.step >= total:
        done = f"step {run.step} of training.max_train_steps={total}"
        say(accelerator, f"nothing is left to train: {done}; a larger one goes on")
    start_trackers(run)
    log = RunLog(run.path, run.step, total, accelerator) if accelerator.is_main_process else None
    work = step_work(run)
    describe_run(run, work)
    saver = Saver(run, log.say if log else print)
    clock, agreement = Clock(accelerator.device), Agreement(accelerator)
    accelerator.wait_for_everyone()  # one that is still setting up leaves at a signal
    SIGNAL.hold(config.experiment.grace_s)
    while run.step < total:
        grad_norm = training_step(run, clock)
        if log:
            log.step()
        if run.step % config.experiment.log_every == 0 or run.step in (1, total):
            metrics = collect_metrics(run, clock, grad_norm, work)
            if log:
                log.write(run.step, metrics)
        wish = agreement.largest(STOP if SIGNAL.received else saver.wish())
        with clock.paused():
            if wish != STOP:
                look(run, log)
            save(run, saver, wish)
        if wish == STOP and run.step < total:
            say(accelerator, f"signal: saved at step {run.step}, run it again to go on")
            return False
    save_final(run)
    if log:
        log.close()
    return True


def look(run: Run, log: RunLog | None) -> None:
    """Between steps: validation loss and pictures, each where it is due."""
    config = run.config
    if run.eval_loader is not None and due(run, config.experiment.eval_every):
        found = evaluate(run, run.eval_loader)
        if log:
            log.write(run.step, found)
    if due(run, config.experiment.generate_every):
        # shapes are not those of training: nothing is compiled for them
        with whole_model(run) as model, torch.compiler.set_stance("force_eager"):
            if model is not None and run.samples and log:
                written = run.samples.write(model, run.path, run.step)
                log.say(f"pictures: {written}")
                track_picture(run.accelerator, "samples", written, run.step)


def save(run: Run, saver: Saver, wish: int) -> None:
    """Between steps: a checkpoint where it is due; the last one is waited for."""
    if wish == TROUBLE:
        saver.finish()
    is_last = wish == STOP or run.step == run.config.training.max_train_steps
    if is_last or wish == SAVE or due(run, run.config.experiment.save_every):
        saver.save(wait=is_last)
