"""What a run says: console lines, metrics.jsonl, and trackers when asked for.

A line of metrics.jsonl: {"step", "time" (seconds since 1970), and what metrics.py names}; those of
validation have "eval_…" names only.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from tqdm import tqdm

from train_stage.reporting.history import METRICS

CONSOLE: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "accuracy": lambda value: f"accuracy {value:.1%}",
    "eval_loss": lambda value: f"eval loss {value:.4f}",
    "eval_loss_ema": lambda value: f"averaged {value:.4f}",
    "learning_rate": lambda value: f"lr {value:.3g}",
    "grad_norm": lambda value: f"gradient {value:.3g}",
    "images_per_s": lambda value: f"{_count(value)} images/s",
    "tokens_per_s": lambda value: f"{_count(value)} tokens/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "data_wait": lambda value: f"data wait {value:.1%}",
    "peak_memory_gb": lambda value: f"{value:.3g} GB",
}


class Tracker(Protocol):
    """What accelerate's Accelerator.log offers."""

    def log(self, values: dict[str, Any], step: int | None) -> None: ...


class RunLog:
    """Writes on one process only. metrics.jsonl has one object a log step, in step order.

    On resume, lines of steps after `step` are dropped: those steps are done again.
    """

    def __init__(self, run: Path, step: int, total: int, tracker: Tracker):
        self.path, self.total, self.tracker = run / METRICS, total, tracker
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
        line = {"step": step, "time": round(time.time(), 1), **metrics}
        self._file.write(json.dumps(line) + "\n")
        self.tracker.log(metrics, step)
        words = [say(metrics[key]) for key, say in CONSOLE.items() if key in metrics]
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


def _count(value: float) -> str:
    """1234567 as 1.23 M."""
    thousands = min(3, int(math.log10(max(1.0, value))) // 3)
    return f"{value / 1000**thousands:.3g}{('', ' k', ' M', ' G')[thousands]}"
