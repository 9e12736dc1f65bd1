"""What a run leaves behind: its checkpoints, and the model at its end."""

from pathlib import Path

from configs.load import dump_config
from train_stage.training.checkpoint import save_checkpoint, save_model
from train_stage.training.metrics import all_sums
from train_stage.training.run import Run


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
