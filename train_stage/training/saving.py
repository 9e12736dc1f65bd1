"""What a run leaves behind: its checkpoints, and the model at its end.

The loop waits only while weights, averaged weights and optimizer are copied to host memory; a
thread of the main process hashes, writes and renames, at most one checkpoint at a time.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree

from torch import Tensor

from configs.load import dump_config
from storage.atomic import atomic_directory
from train_stage.training.agreement import decide
from train_stage.training.checkpoint import (
    AVERAGED,
    STAGING,
    UNWRAPPED,
    Snapshot,
    remove,
    write_checkpoint,
    write_model,
)
from train_stage.training.metrics import all_sums
from train_stage.training.parallel import full_optimizer_state, full_tensors, is_sharded
from train_stage.training.run import Run
from train_stage.training.run_token import Replaced, check_token, take_token
from train_stage.training.sharded_checkpoint import save_shards

SAVE, TROUBLE = 1, 2  # what Saver.wish says


class Saver:
    """Writes the checkpoints of a run; `say` tells of them. Takes the run directory's token."""

    def __init__(self, run: Run, say: Callable[[str], None]):
        self.run, self.say = run, say
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[str] | None = None
        self._saved_at = time.monotonic()
        self._token = ""
        if run.accelerator.is_main_process:
            self._token = take_token(run.path)
            rmtree(run.path / STAGING, ignore_errors=True)  # of processes that were killed

    def wish(self) -> int:
        """What the main process wants after a step: 0 nothing, SAVE or TROUBLE (call `finish`)."""
        if self._writing is not None and self._writing.done():
            if self._writing.exception() is not None:
                return TROUBLE
            self._tell()
        every, now = self.run.config.experiment.save_every_minutes * 60, time.monotonic()
        if not every or now - self._saved_at < every or not self.run.accelerator.is_main_process:
            return 0
        self._saved_at = now  # asked for once
        return SAVE

    def save(self, wait: bool = False) -> None:
        """Copies the run and starts to write it; collective. `wait`: until it is on the disk."""
        began = time.perf_counter()
        self.finish()
        content = take_snapshot(self.run)
        self._saved_at = time.monotonic()
        if content is not None:
            self._writing = self._thread.submit(self._write, content, time.perf_counter() - began)
        if wait or not self.run.config.experiment.async_checkpoint:
            self.finish()

    def finish(self) -> None:
        """Waits until nothing is being written; collective.

        Raises OSError on all processes for what could not be written, Replaced where another
        process has taken the run directory.
        """
        decide(self._tell)

    def _tell(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            self.say(f"checkpoint: {writing.result()}")

    def _write(self, content: Snapshot, waited_s: float) -> str:
        """In the thread; returns what is said of it."""
        run, began = self.run, time.perf_counter()
        limit = run.config.experiment.checkpoints_total_limit
        try:
            self._check()
            path = write_checkpoint(run.path, content, limit, self._check)
        except Replaced:
            raise
        except Exception as error:  # torch and safetensors have their own for a full disk
            self._check()  # the newer process may have removed what this one was writing
            where = f"checkpoint-{content.step} of {run.path}"
            raise OSError(f"{where} could not be written: {error}; the run is as it was") from error
        written_s = time.perf_counter() - began
        return f"{path} (training waited {waited_s:.1f} s, written in {written_s:.1f} s)"

    def _check(self) -> None:
        check_token(self.run.path, self._token)


def take_snapshot(run: Run) -> Snapshot | None:
    """The run in host memory, on the main process; None on the others. Collective."""
    sums, scaler = all_sums(run), run.accelerator.scaler
    run.loader.step = run.step
    models: dict[str, dict[str, Tensor]] = {}
    shards: Path | None = None
    if not is_sharded(run.model) and not run.accelerator.is_main_process:
        return None
    if is_sharded(run.model) and run.config.training.fsdp.checkpoints == "sharded":
        shards = run.path / STAGING / f"shards-{run.step}"
        decide(lambda: shards.mkdir(parents=True))
        optimizer = save_shards(run, shards)
    else:
        weights = run.model.state_dict()
        models[UNWRAPPED] = full_tensors(weights)
        if run.ema is not None:
            models[AVERAGED] = full_tensors(weights | run.ema.shadow)
        optimizer = full_optimizer_state(run)
    if not run.accelerator.is_main_process:
        return None
    state = {
        "optimizer": optimizer,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "sums": sums.cpu(),
        "schedule_start": run.schedule_start,
    }
    if run.ema is not None:
        state["ema"] = run.ema.counters()
    return Snapshot(
        run.step,
        models,
        shards,
        run.model.config_dict(),
        run.codes,
        state,
        run.loader.state_dict(),
        dump_config(run.config),
    )


def save_final(run: Run) -> None:
    """Writes RUN/model, averaged weights where there are any; collective."""
    path = run.path / "model"
    weights = full_tensors(run.model.state_dict() | (run.ema.shadow if run.ema is not None else {}))
    if not run.accelerator.is_main_process:
        return
    with atomic_directory(path) as folder:
        write_model(folder, weights, run.model.config_dict(), run.codes)
        if path.is_dir():  # of the same run, when it had fewer steps
            remove(path)
    print(f"model: {path}\nnext: muse-generate model={path} output_dir={run.path / 'generated'}")
