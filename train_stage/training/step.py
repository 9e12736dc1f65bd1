"""One optimizer step: batch, masks, forward and backward passes, update.

The loss is a sum over this process's codes divided by the count over all processes.
"""

import torch
from torch.distributed.tensor import DTensor

from train_stage.objective.masked_batch import DROPOUT, MaskedBatch, stream_seed
from train_stage.objective.sums import Sums
from train_stage.training.clock import Clock
from train_stage.training.lr_schedule import lr_factor
from train_stage.training.parallel import accumulating
from train_stage.training.run import Run, make_masked


def training_step(run: Run, clock: Clock) -> torch.Tensor:
    """One optimizer step; returns the gradient's norm before clipping."""
    config, accelerator = run.config.training, run.accelerator
    with clock.waiting():
        batch = run.loader.batch(0 if config.overfit_one_batch else run.step)
    masked = make_masked(run, batch)
    # every step starts its own random stream, so that resuming needs no generator state
    torch.manual_seed(stream_seed(config.seed, run.step, DROPOUT, accelerator.process_index))
    run.loss_module.train()
    set_learning_rate(run)
    run.sums.merge(backward(run, masked))
    limit = float("inf") if config.max_grad_norm is None else config.max_grad_norm
    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), limit)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    run.optimizer.step()
    run.skipped += accelerator.optimizer_step_was_skipped
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(run.model)
    run.step += 1
    clock.images += run.loader.global_batch_size
    return grad_norm


def backward(run: Run, batch: MaskedBatch) -> Sums:
    """Forward and backward of this process's batch in `run.passes` parts; returns its loss sums.

    Gradients are averaged over processes, hence the factor num_processes.
    """
    accelerator, sums = run.accelerator, Sums.zeros(batch.input_ids.device)
    scale = accelerator.num_processes / batch.denominator
    for index, part in enumerate(batch.split(run.passes)):
        with accumulating(run.loss_module, more_to_come=index < run.passes - 1):
            out = run.loss_module(**part)
            accelerator.backward(out["total"] * scale)
        sums.add(out)
    return sums


def set_learning_rate(run: Run) -> None:
    """The schedule's rate for this step, in every parameter group."""
    scheduler, params = run.config.lr_scheduler, run.config.lr_scheduler.params
    factor = lr_factor(
        scheduler.scheduler,
        run.step - run.schedule_start,
        params.warmup_steps,
        run.config.training.max_train_steps - run.schedule_start,
        params.num_cycles,
        params.power,
        run.learning_rate,
        params.decay_steps,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate * factor
