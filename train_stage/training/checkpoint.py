"""Checkpoints: everything to go on, in one directory that exists whole or not at all.

RUN/checkpoint-1000/
    unwrapped_model/      config.json, model.safetensors (load it with from_pretrained), codes.json
    ema_model/            the same of the averaged weights, where EMA is on
    training_state.pt     optimizer, gradient scaler, EMA counters, sums for the log (no code)
    metadata.json         global_step, loader position, sha256 of every file
    config.yaml           the resolved configuration

Random generators need no state: all randomness of a step follows from (seed, step).
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from storage.atomic import atomic_directory, read_json, write_json
from storage.fingerprint import file_sha256
from storage.pretrained import PretrainedModel, load_strictly, read_weights
from train_stage.training.ema import EMA

PREFIX = "checkpoint-"
CODES = "codes.json"  # which tokenizer's codes a model speaks


def save_checkpoint(
    run: Path,
    step: int,
    model: PretrainedModel,
    ema: EMA | None,
    codes: dict[str, Any],
    state: dict[str, Any],
    loader_state: dict[str, Any],
    config_yaml: str,
    limit: int | None,
) -> Path:
    """Writes RUN/checkpoint-`step` and removes the oldest beyond `limit`; returns its path.

    codes: what codes.json holds; state: tensors and plain values for training_state.pt.
    """
    path = run / f"{PREFIX}{step}"
    with atomic_directory(path) as folder:
        save_model(model, None, folder / "unwrapped_model", codes)
        if ema is not None:
            save_model(model, ema, folder / "ema_model", codes)
            state = {**state, "ema": ema.counters()}
        torch.save(state, folder / "training_state.pt")
        (folder / "config.yaml").write_text(config_yaml)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        digests = {str(file.relative_to(folder)): file_sha256(file) for file in files}
        metadata = {"global_step": step, "loader": loader_state, "files": digests}
        write_json(folder / "metadata.json", metadata)
    for old in find_checkpoints(run)[:-limit] if limit else []:
        shutil.rmtree(old)
    return path


def save_model(model: PretrainedModel, ema: EMA | None, path: Path, codes: dict[str, Any]) -> None:
    """Writes the model directory, of the averaged weights when there is an EMA."""
    if ema is not None:
        ema.swap_in(model)
    try:
        model.save_pretrained(path)
    finally:
        if ema is not None:
            ema.swap_out(model)
    write_json(path / CODES, codes)


def load_checkpoint(path: Path, model: PretrainedModel, ema: EMA | None) -> dict[str, Any]:
    """Puts a checkpoint's weights into `model` and `ema`; returns the rest.

    That is global_step, loader and what `state` held. Raises ValueError for a damaged file,
    weights that do not fit, or a missing EMA.
    """
    metadata = read_json(path / "metadata.json")
    for name, digest in metadata["files"].items():
        if not (path / name).is_file() or file_sha256(path / name) != digest:
            raise ValueError(
                f"{path / name} is damaged or missing: remove {path} to go on from the one before"
            )
    state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
    load_strictly(model, read_weights(path / "unwrapped_model"), str(path))
    if ema is not None:
        if "ema" not in state:
            raise ValueError(f"{path} has no EMA: set training.use_ema=false or start a new run")
        ema.load_state_dict({**state["ema"], "shadow": read_weights(path / "ema_model")})
    return {**state, "global_step": metadata["global_step"], "loader": metadata["loader"]}


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
    chosen, found = Path(wanted), find_checkpoints(run)
    if not (chosen / "metadata.json").is_file():
        have = ", ".join(map(str, found)) or "none"
        raise FileNotFoundError(f"{wanted} is not a checkpoint; in the run directory: {have}")
    if found and found[-1].resolve() != chosen.resolve():
        raise ValueError(
            f"{run} goes on to {found[-1].name}: to branch off at {chosen} choose another "
            "experiment.output_dir, or remove the other checkpoints"
        )
    return chosen
