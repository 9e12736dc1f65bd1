"""What a run says: console lines, metrics.jsonl, and trackers when asked for."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from tqdm import tqdm


class Tracker(Protocol):
    """What accelerate's Accelerator.log offers."""

    def log(self, values: dict[str, Any], step: int | None) -> None: ...


class RunLog:
    """Writes on one process only. metrics.jsonl has one object a log step, in step order.

    On resume, lines of steps after `step` are dropped: those steps are done again.
    """

    def __init__(self, run: Path, step: int, total: int, tracker: Tracker):
        self.path, self.total, self.tracker = run / "metrics.jsonl", total, tracker
        kept = []
        if self.path.is_file():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", buffering=1)
        self._bar = tqdm(
            total=total, initial=step, unit="step", dynamic_ncols=True, disable=None, smoothing=0.05
        )
        self._started, self._first = time.monotonic(), step

    def step(self) -> None:
        """One optimizer step is done."""
        self._bar.update()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One log step: to the file, the trackers and, the main numbers, the console."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.tracker.log(metrics, step)
        main = ("loss", "accuracy", "eval_loss", "learning_rate", "grad_norm", "images_per_s")
        words = [f"{key} {_short(metrics[key])}" for key in main if key in metrics]
        if "data_wait" in metrics:
            words.append(f"data wait {metrics['data_wait']:.1%}")
        self.say(f"step {step}/{self.total}  {'  '.join(words)}  left {self._left(step)}")

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
        self._file.close()

    def _left(self, step: int) -> str:
        done = step - self._first
        seconds = (time.monotonic() - self._started) / max(1, done) * (self.total - step)
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def say(accelerator: Accelerator, text: str) -> None:
    """A line on the console, once for all processes on all nodes."""
    if accelerator.is_main_process:
        print(text, flush=True)


def _step_of(line: str) -> float:
    """The step of a metrics line; a line cut short by a crash counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.4g}"
