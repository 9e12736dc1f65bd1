"""The validation loss, on the same rows with the same masks every time."""

import torch

from train_stage.loading.loader import TokenLoader
from train_stage.objective.sums import Sums, describe_sums
from train_stage.training.run import Run, make_masked

EVAL_ROWS = 8192  # the validation loss uses this many rows at most


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
