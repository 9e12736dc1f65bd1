"""What a launcher starts for tests/test_train_parallel.py: several runs in one pair of processes.

python -m torch.distributed.run --nproc-per-node=2 tests/two_processes.py RUNS.json
"""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_models import class_model, uvit_condition, uvit_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import train_stage.train
from train_stage.objective.loss import MaskedLoss
from train_stage.training.config import TrainingConfig
from train_stage.training.optimizer import make_optimizer
from train_stage.training.parallel import (
    full_optimizer_state,
    full_tensors,
    like,
    load_full_tensors,
    load_optimizer_state,
    place,
    whole_model,
)
from train_stage.training.whole_step import see_whole_weights


def run_all(runs):
    """muse-train with each of these arguments, one after the other; all must end well."""
    torch.set_num_threads(1)
    for argv in runs:
        AcceleratorState._reset_state(reset_partial_state=True)
        if code := train_stage.train.main(argv):
            raise SystemExit(f"exit code {code}: {' '.join(argv)}")


def check_sharding(precision, model, backend, **condition):
    """A sharded model, its layers compiled, has the gradients of a whole one, and copies whole."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    whole, shards = MaskedLoss(copy.deepcopy(model)), MaskedLoss(model)
    if backend:
        shards.compile_parts(backend)
    shards = place(shards, accelerator, TrainingConfig(max_train_steps=1, parallel="fsdp"))
    ids = torch.randint(60, (2, 16), generator=torch.Generator().manual_seed(0))
    for loss_module in (whole, shards):
        loss_module.eval()  # no dropout
        with accelerator.autocast():
            total = loss_module(ids, ids, torch.arange(0, 32, 3), **condition)["total"]
        total.backward()
    wanted, found = (
        {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
        for m in (whole.model, model)
    )
    found = full_tensors(found)
    if accelerator.is_main_process:
        close = {"rtol": 1e-4, "atol": 1e-5} if precision == "no" else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(found, wanted, **close)
    double = {name: 2 * p.detach() for name, p in whole.model.named_parameters()}
    load_full_tensors(dict(model.named_parameters()), double)
    with whole_model(SimpleNamespace(model=model, ema=None, accelerator=accelerator)) as copied:
        assert (copied is not None) == accelerator.is_main_process
        if copied is not None:
            found = dict(copied.named_parameters())
            torch.testing.assert_close(found, double, rtol=0, atol=0)


def check_optimizer(name):
    """Steps of shards are those of whole weights, also when their state comes from the other."""

    def make(is_sharded):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.Conv2d(3, 5, 1), nn.Linear(3, 1, bias=False))
        if is_sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = make_optimizer(model, name, 1e-2, (0.9, 0.99), 0.1, 1e-8)
        if is_sharded:
            see_whole_weights(optimizer)
        return SimpleNamespace(model=model, optimizer=optimizer)

    whole, shards = make(False), make(True)
    for seed in range(4):
        torch.manual_seed(seed)
        for one, two in zip(whole.model.parameters(), shards.model.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            two.grad = like(two, one.grad)
        whole.optimizer.step()
        shards.optimizer.step()
        if seed == 1:
            load_optimizer_state(shards, copy.deepcopy(whole.optimizer.state_dict()))
    found, state = full_tensors(shards.model.state_dict()), full_optimizer_state(shards)
    if torch.distributed.get_rank() == 0:
        torch.testing.assert_close(found, whole.model.state_dict(), rtol=1e-4, atol=1e-5)
        wanted = whole.optimizer.state_dict()
        torch.testing.assert_close(flat(state), flat(wanted), rtol=1e-4, atol=1e-5)


def flat(state, name=""):
    """The tensors of a state_dict by where they are."""
    if isinstance(state, dict | list):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        parts = [flat(item, f"{name}.{key}") for key, item in pairs]
        return {place: tensor for part in parts for place, tensor in part.items()}
    return {name: state} if isinstance(state, torch.Tensor) else {}


def main():
    # a second process group cannot use the addresses of the first: all runs share one
    torch.distributed.destroy_process_group = lambda *_: None
    run_all(json.loads(Path(sys.argv[1]).read_text()))
    check_sharding("bf16", class_model(), "aot_eager")
    given = uvit_condition(2)
    condition = {name: values.expand(2, *values.shape[1:]) for name, values in given.items()}
    check_sharding("no", uvit_model(), None, **condition)
    for name in ("adamw", "lion", "adafactor", "muon"):
        check_optimizer(name)


if __name__ == "__main__":
    main()
