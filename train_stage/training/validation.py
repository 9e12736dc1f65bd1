"""The validation loss, on the same rows with the same masks every time (steps 5 to 7).

eval_loss has the mask ratios of training, so it can be held against the training loss.
training.eval_mask_ratios are evaluated one by one beside it: they say what the model knows of
nearly finished and of empty images, whatever the schedule. eval_loss_ema is eval_loss by the
averaged weights.
"""

from dataclasses import replace

import torch

from train_stage.loading.loader import TokenLoader
from train_stage.objective.sums import Sums, describe_sums
from train_stage.training.run import Run, make_masked

EVAL_ROWS = 8192  # at most, for the ratios of training, and for all fixed ones together


@torch.no_grad()
def evaluate(run: Run, loader: TokenLoader) -> dict[str, float]:
    """Mean cross-entropies (nats) and the accuracy by name; a collective call."""
    scores = evaluate_rows(run, loader, EVAL_ROWS)
    found = {"eval_loss": scores["cross_entropy"], "eval_accuracy": scores["accuracy"]}
    ratios = run.config.training.eval_mask_ratios
    for ratio in ratios:
        scores = evaluate_rows(with_mask_ratio(run, ratio), loader, EVAL_ROWS // len(ratios))
        found[f"eval_loss_ratio_{ratio:g}"] = scores["cross_entropy"]
    if run.ema is not None:
        run.ema.swap_in(run.model)
        try:
            found["eval_loss_ema"] = evaluate_rows(run, loader, EVAL_ROWS)["cross_entropy"]
        finally:
            run.ema.swap_out(run.model)
    return found


def evaluate_rows(run: Run, loader: TokenLoader, most: int) -> dict[str, float]:
    """describe_sums of the first rows, `most` at most, in whole batches."""
    sums = Sums.zeros(run.accelerator.device)
    run.loss_module.eval()
    for step in range(-(-min(loader.rows, most) // loader.global_batch_size)):
        for part in make_masked(run, loader.batch(step)).split(run.passes):
            sums.add(run.loss_module(**part))
    return describe_sums(run.accelerator.reduce(sums.flat(), reduction="sum").tolist())


def with_mask_ratio(run: Run, ratio: float) -> Run:
    """The run with a schedule that hides the same share of every row."""
    return replace(run, schedule=lambda t: torch.full_like(t, ratio))
