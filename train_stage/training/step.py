"""One optimizer step: batch, masks, forward and backward passes, update.

The loss is a sum over this process's codes divided by the count over all processes.
"""

import time
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from train_stage.objective.masked_batch import DROPOUT, MaskedBatch, stream_seed
from train_stage.objective.sums import Sums
from train_stage.training.clock import Clock
from train_stage.training.lr_schedule import lr_factor
from train_stage.training.run import Run, make_masked


def training_step(run: Run, clock: Clock) -> torch.Tensor:
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


def backward(
    loss_module: nn.Module, batch: MaskedBatch, passes: int, accelerator: Accelerator
) -> Sums:
    """Forward and backward of this process's batch in `passes` parts; returns its loss sums.

    DistributedDataParallel averages gradients over processes, hence the factor num_processes.
    """
    sums = Sums.zeros(batch.input_ids.device)
    scale = accelerator.num_processes / batch.scored
    for index, (input_ids, labels, positions) in enumerate(batch.split(passes)):
        more_to_come = index < passes - 1
        with accelerator.no_sync(loss_module) if more_to_come else nullcontext():
            out = loss_module(input_ids, labels, positions)
            accelerator.backward(out["total"] * scale)
        sums.add(out, labels)
    return sums


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
        params.decay_steps,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate * factor
