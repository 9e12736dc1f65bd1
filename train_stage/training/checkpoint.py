"""Checkpoints: everything to go on, in one directory that exists whole or not at all.

RUN/checkpoint-1000/
    unwrapped_model/      config.json, model.safetensors (load it with from_pretrained), codes.json
    ema_model/            the same of the averaged weights, where EMA is on
    shards/               in place of both, and of the optimizer's tensors, where they are sharded
    training_state.pt     optimizer, gradient scaler, EMA counters, sums for the log (no code)
    metadata.json         global_step, loader position, sha256 of every file
    config.yaml           the resolved configuration

Random generators need no state: all randomness of a step follows from (seed, step).
"""

import json
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from storage.atomic import atomic_directory, read_json, write_json
from storage.fingerprint import file_sha256
from storage.pretrained import CONFIG_NAME, SAFE_NAME

PREFIX, DAMAGED = "checkpoint-", ".damaged"
UNWRAPPED, AVERAGED, SHARDS = "unwrapped_model", "ema_model", "shards"
STAGING = ".staging"  # where atomic_directory writes, and where what is removed goes
CODES = "codes.json"  # which tokenizer's codes a model speaks


@dataclass
class Snapshot:
    """What a checkpoint holds, in host memory: the run may train on while it is written."""

    step: int
    models: dict[str, dict[str, Tensor]]  # the weights of UNWRAPPED and AVERAGED
    shards: Path | None  # written already, in place of `models`
    model_config: dict[str, Any]  # config.json
    codes: dict[str, Any]  # codes.json
    state: dict[str, Any]  # tensors and plain values for training_state.pt
    loader: dict[str, Any]  # the loader's position
    config_yaml: str


def write_checkpoint(
    run: Path, content: Snapshot, limit: int | None, check: Callable[[], None]
) -> Path:
    """Writes RUN/checkpoint-… and removes the oldest beyond `limit`; returns its path.

    check: called before it gets its name; what it raises leaves no checkpoint.
    """
    path = run / f"{PREFIX}{content.step}"
    with atomic_directory(path) as folder:
        for name, weights in content.models.items():
            write_model(folder / name, weights, content.model_config, content.codes)
        if content.shards is not None:
            content.shards.rename(folder / SHARDS)
        torch.save(content.state, folder / "training_state.pt")
        (folder / "config.yaml").write_text(content.config_yaml)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        digests = {str(file.relative_to(folder)): file_sha256(file) for file in files}
        metadata = {"global_step": content.step, "loader": content.loader, "files": digests}
        write_json(folder / "metadata.json", metadata)
        check()
    for old in find_checkpoints(run)[:-limit] if limit else []:
        remove(old)
    return path


def remove(path: Path) -> None:
    """Takes a checkpoint's name away before its files, so that it is never there in part."""
    gone = path.parent / STAGING / f"{path.name}.{uuid.uuid4().hex}"
    gone.parent.mkdir(exist_ok=True)
    shutil.rmtree(path.rename(gone))
    with suppress(OSError):  # something else is in there
        gone.parent.rmdir()


def write_model(
    path: Path, weights: dict[str, Tensor], config: dict[str, Any], codes: dict[str, Any]
) -> None:
    """Writes the model directory `path`, which must be new or empty."""
    path.mkdir(exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(whole, path / SAFE_NAME, metadata={"format": "pt"})
    (path / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    write_json(path / CODES, codes)


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


def check_checkpoint(path: Path) -> None:
    """Raises ValueError, naming the file, when a byte of a checkpoint has changed or is gone."""
    for name, digest in read_metadata(path)["files"].items():
        if not (path / name).is_file() or file_sha256(path / name) != digest:
            raise ValueError(f"{path / name} is damaged or missing")


def read_metadata(path: Path) -> dict[str, Any]:
    """metadata.json. Raises ValueError when it is damaged or missing."""
    if not (path / "metadata.json").is_file():
        raise ValueError(f"{path / 'metadata.json'} is missing")
    return read_json(path / "metadata.json")


def newest_whole(run: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that is whole; None where there is none of any kind.

    Damaged ones that are newer are moved aside, as checkpoint-….damaged, and named by `say`.
    Raises ValueError when all are damaged; then they stay where they are.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(find_checkpoints(run)):
        try:
            check_checkpoint(path)
        except ValueError as error:
            damaged.append((path, str(error)))
            continue
        for old, problem in damaged:
            say(f"warning: {problem}; {move_aside(old)} keeps it, going back to {path.name}")
        return path
    if damaged:
        raise ValueError(
            f"no checkpoint of {run} is whole: {'; '.join(problem for _, problem in damaged)}; "
            "restore one, or remove them to start from the beginning"
        )
    return None


def move_aside(path: Path) -> Path:
    """Renames checkpoint-N to checkpoint-N.damaged, or .damaged2 where that is taken, and so on."""
    number, target = 1, path.with_name(path.name + DAMAGED)
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}{DAMAGED}{number}")
    return path.rename(target)


def choose_checkpoint(run: Path, wanted: str | None) -> Path | None:
    """The checkpoint to go on from, whole; None starts anew. `wanted`: "latest", a path or None.

    Raises ValueError or FileNotFoundError for what cannot be gone on from.
    """
    if wanted == "latest":
        return newest_whole(run)
    found = find_checkpoints(run)
    if wanted is None:
        if found:
            raise ValueError(
                f"{run} holds checkpoints of another run: choose another experiment.output_dir, "
                "or experiment.resume_from_checkpoint=latest to go on"
            )
        return None
    chosen = Path(wanted)
    if not (chosen / "metadata.json").is_file():
        have = ", ".join(map(str, found)) or "none"
        raise FileNotFoundError(f"{wanted} is not a checkpoint; in the run directory: {have}")
    if found and found[-1].resolve() != chosen.resolve():
        raise ValueError(
            f"{run} goes on to {found[-1].name}: to branch off at {chosen} choose another "
            "experiment.output_dir, or remove the other checkpoints"
        )
    check_checkpoint(chosen)
    return chosen
