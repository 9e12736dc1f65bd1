"""Weights, averages and optimizer of a run in shards: each process writes what it holds.

FOLDER/shard-00001-model-00001-of-00001.safetensors, …: torch.distributed.checkpoint in its
safetensors format (no pickle), read by any number of processes. Tensors are called model.NAME,
ema.NAME, and optimizer.PLACE by their place in the optimizer's state_dict.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from train_stage.training.parallel import make_states
from train_stage.training.run import Run

SHARDED = "in the shards"  # what stands in a state_dict for such a tensor


def save_shards(run: Run, folder: Path) -> dict[str, Any]:
    """Writes the tensors of a sharded run (parallel.is_sharded) into an empty folder; collective.

    Returns the optimizer's state_dict less what is in the shards, the same on every process.
    """
    tensors = weights(run)
    rest = without_shards(run.optimizer.state_dict(), "optimizer", tensors)
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer)
    return rest


def load_shards(run: Run, folder: Path, rest: dict[str, Any] | None) -> None:
    """Puts the shards into a run, sharded or not; collective.

    rest: what save_shards returned, or None to leave the optimizer as it is. Raises ValueError,
    before anything is changed, for tensors that are missing or of another shape.
    """
    wanted = weights(run)
    if rest is not None:
        make_states(run.optimizer)
        wanted |= shards_of(rest, run.optimizer.state_dict(), "optimizer")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    found: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    for name, tensor in wanted.items():
        size = tuple(found[name].size) if name in found else "not there"
        if size != tuple(tensor.shape):
            raise ValueError(f"{folder}: {name} is {size}, the run has {tuple(tensor.shape)}")
    with warnings.catch_warnings():  # which it says of one process even when it is told
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    if rest is not None:
        run.optimizer.load_state_dict(with_shards(rest, "optimizer", wanted))


def weights(run: Run) -> dict[str, Tensor]:
    """The model's and, where there are any, the averaged ones."""
    averaged = run.ema.shadow if run.ema is not None else {}
    return {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()} | {
        f"ema.{name}": tensor for name, tensor in averaged.items()
    }


def without_shards(value: Any, name: str, taken: dict[str, Tensor]) -> Any:
    """`value` with SHARDED in place of every DTensor, which goes into `taken`."""
    if isinstance(value, dict):
        return {k: without_shards(item, f"{name}.{k}", taken) for k, item in value.items()}
    if isinstance(value, list):
        return [without_shards(item, f"{name}.{k}", taken) for k, item in enumerate(value)]
    if isinstance(value, DTensor):
        taken[name] = value
        return SHARDED
    return value


def shards_of(rest: Any, state: Any, name: str) -> dict[str, Tensor]:
    """The tensors of `state` that stand where `rest` says SHARDED, by name."""
    if isinstance(rest, dict | list):
        pairs = rest.items() if isinstance(rest, dict) else enumerate(rest)
        parts = [shards_of(item, state[k], f"{name}.{k}") for k, item in pairs]
        return {found: tensor for part in parts for found, tensor in part.items()}
    return {name: state} if rest == SHARDED else {}


def with_shards(rest: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`rest` with the tensors where it says SHARDED."""
    if isinstance(rest, dict):
        return {k: with_shards(item, f"{name}.{k}", tensors) for k, item in rest.items()}
    if isinstance(rest, list):
        return [with_shards(item, f"{name}.{k}", tensors) for k, item in enumerate(rest)]
    return tensors[name] if rest == SHARDED else rest
