"""Checkpoints: everything to go on, in one directory that exists whole or not at all.

RUN/checkpoint-1000/
    unwrapped_model/      config.json, model.safetensors (load it with from_pretrained)
    ema_model/            the averaged weights, where EMA is on
    training_state.pt     optimizer, gradient scaler, EMA counters (tensors and numbers only)
    metadata.json         global_step, loader position
    config.yaml           the resolved configuration

Random generators need no state: all randomness of a step follows from (seed, step).
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from storage.atomic import atomic_directory, read_json, write_json
from storage.pretrained import PretrainedModel, load_strictly, read_weights
from train_stage.ema import EMA

PREFIX = "checkpoint-"


def save_checkpoint(
    run: Path,
    step: int,
    model: PretrainedModel,
    optimizer_state: dict[str, Any],
    scaler_state: dict[str, Any] | None,
    loader_state: dict[str, Any],
    config_yaml: str,
    ema: EMA | None,
    limit: int | None,
) -> Path:
    """Writes RUN/checkpoint-`step` and removes the oldest beyond `limit`; returns its path."""
    path = run / f"{PREFIX}{step}"
    with atomic_directory(path) as folder:
        model.save_pretrained(folder / "unwrapped_model")
        state = {"optimizer": optimizer_state, "scaler": scaler_state, "ema": None}
        if ema is not None:
            save_averaged(model, ema, folder / "ema_model")
            state["ema"] = {k: v for k, v in ema.state_dict().items() if k != "shadow"}
        torch.save(state, folder / "training_state.pt")
        (folder / "config.yaml").write_text(config_yaml)
        write_json(folder / "metadata.json", {"global_step": step, "loader": loader_state})
    for old in find_checkpoints(run)[:-limit] if limit else []:
        shutil.rmtree(old)
    return path


def save_averaged(model: PretrainedModel, ema: EMA, path: Path) -> None:
    """Writes the model directory of the averaged weights."""
    ema.swap_in(model)
    try:
        model.save_pretrained(path)
    finally:
        ema.swap_out(model)


def load_checkpoint(path: Path, model: PretrainedModel, ema: EMA | None) -> dict[str, Any]:
    """Puts a checkpoint's weights into `model` and `ema`; returns the rest.

    Keys: global_step, loader, optimizer, scaler. Raises ValueError for weights that do not fit or
    a damaged file.
    """
    metadata = read_json(path / "metadata.json")
    state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
    load_strictly(model, read_weights(path / "unwrapped_model"), str(path))
    if ema is not None:
        if state["ema"] is None:
            raise ValueError(f"{path} has no EMA: set training.use_ema=false or start a new run")
        ema.load_state_dict({**state["ema"], "shadow": read_weights(path / "ema_model")})
    return {**metadata, "optimizer": state["optimizer"], "scaler": state["scaler"]}


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


def choose_checkpoint(run: Path, wanted: str | None) -> Path | None:
    """The checkpoint to go on from: None starts anew. `wanted`: "latest", a path or None."""
    if wanted == "latest":
        found = find_checkpoints(run)
        return found[-1] if found else None
    if wanted is None:
        if find_checkpoints(run):
            raise ValueError(
                f"{run} holds checkpoints of another run: choose another experiment.output_dir, "
                "or experiment.resume_from_checkpoint=latest to go on"
            )
        return None
    if not (Path(wanted) / "metadata.json").is_file():
        have = ", ".join(map(str, find_checkpoints(run))) or "none"
        raise FileNotFoundError(f"{wanted} is not a checkpoint; in the run directory: {have}")
    return Path(wanted)
