"""What a run directory says of the run, whether it is going on, has stopped or is done."""

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

METRICS, STARTS = "metrics.jsonl", "starts.jsonl"  # in the run directory: log lines, starts
BUCKET = re.compile(r"loss_masked_(\d+)_(\d+)$")
RATIO = re.compile(r"eval_loss_ratio_([\d.]+)$")


@dataclass(frozen=True)
class Series:
    """One number over the run: steps (n,) int64, ascending, and values (n,) float64."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def after(self, step: int) -> "Series":
        """The part of later steps."""
        later = self.steps > step
        return Series(self.steps[later], self.values[later])

    def last(self, share: float) -> np.ndarray:
        """The values of the last `share` of it, one at least."""
        return self.values[-max(1, math.ceil(share * len(self))) :]


@dataclass(frozen=True)
class History:
    """A run's log lines and starts, oldest first, its options and its grids of pictures."""

    path: Path
    lines: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    options: Any  # config.yaml
    pictures: list[tuple[int, Path]]  # step, file

    @property
    def name(self) -> str:
        return self.option("experiment.name") or self.path.resolve().name

    @property
    def step(self) -> int:
        """Of the last line."""
        return self.lines[-1]["step"]

    @property
    def total(self) -> int | None:
        """Steps that there are to be."""
        return self.option("training.max_train_steps")

    @property
    def guessing(self) -> float | None:
        """ln K, the loss of one who knows nothing of K codes; with smoothed labels, too."""
        return math.log(self.starts[-1]["outputs"]) if self.starts else None

    @property
    def restarts(self) -> list[int]:
        """The steps from which the run went on."""
        return [start["step"] for start in self.starts[1:] if start["step"] > 0]

    def option(self, key: str) -> Any:
        """An option of config.yaml; None where there is none."""
        return OmegaConf.select(self.options, key)

    def series(self, key: str) -> Series:
        """The lines that have `key`."""
        found = [(line["step"], line[key]) for line in self.lines if key in line]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return Series(np.array(steps, np.int64), np.array(values, np.float64))

    @property
    def loss(self) -> Series:
        """Cross-entropy of hidden codes; of runs without it (a critic's), what they minimise."""
        found = self.series("cross_entropy")
        return found if len(found) else self.series("loss")

    def warm(self, key: str) -> Series:
        """A series without the first line after each start, when nothing runs as it will."""
        found = self.series(key)
        cold = np.concatenate([found.after(start).steps[:1] for start in [0, *self.restarts]])
        keep = ~np.isin(found.steps, cold)
        return Series(found.steps[keep], found.values[keep]) if keep.any() else found

    def speed(self, key: str) -> Series:
        """warm(key) since the last start: before, it may have been another machine."""
        return self.warm(key).after(self.starts[-1]["step"] if self.starts else 0)

    def by_mask_ratio(self) -> dict[float, Series]:
        """Training loss by the share of hidden codes (the middle of a tenth), ascending."""
        return self._matching(BUCKET, lambda found: (int(found[1]) + int(found[2])) / 200)

    def by_eval_ratio(self) -> dict[float, Series]:
        """Validation loss by its fixed mask ratios, ascending."""
        return self._matching(RATIO, lambda found: float(found[1]))

    def age_s(self) -> float:
        """Seconds since something was logged."""
        return time.time() - (self.path / METRICS).stat().st_mtime

    def _matching(self, pattern: re.Pattern, ratio_of: Any) -> dict[float, Series]:
        keys = {key for line in self.lines for key in line}
        found = [(ratio_of(match), key) for key in keys if (match := pattern.match(key))]
        return {ratio: self.series(key) for ratio, key in sorted(found)}


def read_history(path: Path) -> History:
    """Reads RUN/metrics.jsonl, starts.jsonl, config.yaml and the names of samples/.

    Raises FileNotFoundError for a folder without log lines.
    """
    lines = read_lines(path / METRICS)
    if not lines:
        raise FileNotFoundError(
            f"{path} has no lines in {METRICS}: give the experiment.output_dir of a run "
            "that has taken a step (muse-train report RUN)"
        )
    config = path / "config.yaml"
    options = OmegaConf.load(config) if config.is_file() else OmegaConf.create()
    found = [
        (int(match[1]), file)
        for file in (path / "samples").glob("*.png")
        if (match := re.search(r"(\d+)\.png$", file.name))
    ]
    return History(path, lines, read_lines(path / STARTS), options, sorted(found))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where there is no file. A line being written is left."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in found if "step" in entry]


def smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """A running mean with Gaussian weights, `share` of the length wide; the ends keep theirs."""
    width = share * len(values)
    if width < 1:
        return values
    reach = int(3 * width)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    total = np.convolve(values, weights, "full")[reach : reach + len(values)]
    return total / np.convolve(np.ones_like(values), weights, "full")[reach : reach + len(values)]
