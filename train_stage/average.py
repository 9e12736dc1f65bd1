"""muse-train average: one model from several checkpoints of a run, without training again.

    muse-train average run=runs/imagenet output=runs/imagenet/averaged last=10
    muse-train average run=runs/imagenet output=runs/imagenet/ema decay=0.8

A plain mean (Izmailov et al. 2018), or a moving average over checkpoints in their order, for runs
that kept none or to try another horizon. experiment.checkpoints_total_limit=null keeps them all.
"""

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING

from configs.load import check_range, load_command_config
from storage.pretrained import load_strictly, read_weights
from train_stage.models.load_transformer import load_transformer
from train_stage.training.checkpoint import CODES, find_checkpoints
from train_stage.training.preemption import EXIT_REFUSED


@dataclass
class AverageConfig:
    run: str = MISSING
    """The run directory that holds checkpoint-*/."""
    output: str = MISSING
    """The model directory to write; muse-generate and muse-evaluate take it."""
    last: int | None = None
    """Only the newest so many checkpoints; null: all there are."""
    decay: float | None = None
    """Of the moving average: what each checkpoint leaves of those before; null: a plain mean."""

    def __post_init__(self) -> None:
        check_range("last", self.last, 1)
        check_range("decay", self.decay, 0, 1)


def main(argv: list[str] | None = None) -> int:
    """Writes the averaged model; returns 0, or 2 when there is nothing to average."""
    config = load_command_config(AverageConfig, argv, __doc__ or "")
    try:
        print(f"model: {average_checkpoints(config)}")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def average_checkpoints(config: AverageConfig) -> Path:
    """Averages what `config` says; returns the model directory."""
    checkpoints = find_checkpoints(Path(config.run))[-(config.last or 0) :]
    folders = [path / "unwrapped_model" for path in checkpoints]
    if lacking := [folder for folder in folders if not folder.is_dir()]:
        raise FileNotFoundError(f"{lacking[0]} is missing: only whole checkpoints can be averaged")
    if len(folders) < 2:
        raise FileNotFoundError(
            f"{config.run}: an average needs 2 checkpoints or more, not {len(folders)}; smaller "
            "experiment.save_every make more, experiment.checkpoints_total_limit=null keeps all"
        )
    print(f"averaging {', '.join(path.name for path in checkpoints)}")
    model = load_transformer(folders[-1])
    load_strictly(model, average_weights(map(read_weights, folders), config.decay), config.run)
    output = Path(config.output)
    model.save_pretrained(output)
    shutil.copyfile(folders[-1] / CODES, output / CODES)
    return output


def average_weights(
    states: Iterable[dict[str, torch.Tensor]], decay: float | None = None
) -> dict[str, torch.Tensor]:
    """The mean of several models' weights by name, or their moving average in the given order."""
    mean: dict[str, torch.Tensor] = {}
    for number, state in enumerate(states):
        share = 1 / (number + 1) if decay is None else 1 - decay
        for name, weight in state.items():
            mean[name] = torch.lerp(mean[name], weight, share) if number else weight
    return mean


if __name__ == "__main__":
    sys.exit(main())
