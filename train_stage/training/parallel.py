"""Several processes, one model: each holds it whole (ddp), or a shard of every weight (fsdp).

Steps 5 to 7 run alike either way. Sharding is torch's fully_shard (FSDP2), layer by layer and the
rest together, beneath accelerate's Accelerator: its own plugin ignores processes without a GPU, so
that what tests run would not be what clusters run. Sharded weights, averages and optimizer states
are DTensors; one process never shards. "Collective" functions are called by all processes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from configs.load import ConfigError
from train_stage.config import TrainConfig
from train_stage.models.token_transformer import TokenTransformer
from train_stage.objective.loss import MaskedLoss
from train_stage.training.config import FsdpConfig, TrainingConfig
from train_stage.training.run import Run

REDUCED = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_launch(config: TrainConfig, has_gpu: bool) -> None:
    """Refuses what cannot be had here, or beside training.parallel."""
    training, is_fsdp = config.training, config.training.parallel == "fsdp"
    if training.mixed_precision == "fp16" and not has_gpu:
        raise ConfigError("training.mixed_precision=fp16 needs a GPU; on a CPU: bf16 or no")
    if is_fsdp and training.fsdp.cpu_offload and not has_gpu:
        raise ConfigError("training.fsdp.cpu_offload=true is for GPUs: without one leave it false")
    if is_fsdp and config.optimizer.name == "8bit_adamw":
        raise ConfigError(
            "optimizer.name=8bit_adamw cannot step shards: take adamw (its state is sharded, too), "
            "lion or adafactor, or training.parallel=ddp"
        )
    for name, asked in (("FSDP", "--use_fsdp"), ("DEEPSPEED", "--use_deepspeed")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(
                f"accelerate launch {asked}: muse-train shards by itself, launch it without and "
                "give training.parallel=fsdp (with training.fsdp.reshard_after_forward=false as "
                "ZeRO 2 does, else as ZeRO 3)"
            )


def place(loss_module: MaskedLoss, accelerator: Accelerator, config: TrainingConfig) -> nn.Module:
    """MaskedLoss as a step calls it: sharded in place or wrapped; before the optimizer is made."""
    if config.parallel == "fsdp" and accelerator.num_processes > 1:
        shard_model(loss_module, accelerator, config.fsdp)
        return accelerator.prepare_model(loss_module, device_placement=False, evaluation_mode=True)
    c = loss_module.model.config
    is_idle = getattr(c, "project_encoder_hidden_states", False) and not c.add_cross_attention
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,  # else every gradient is kept twice
        find_unused_parameters=is_idle or c.self_conditioning or c.critic_head,
    )
    return accelerator.prepare_model(loss_module)


def shard_model(loss_module: MaskedLoss, accelerator: Accelerator, options: FsdpConfig) -> None:
    """Gives each process its shard of every weight, in place; before the optimizer is made.

    What is outside of the layers (embeddings, head) is gathered in float32, whatever the precision.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    offload = CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy()
    policy = layer_precision(REDUCED[accelerator.mixed_precision])
    for layer in loss_module.model.layers():
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=options.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
    fully_shard(loss_module, mesh=mesh, offload_policy=offload)
    loss_module.register_forward_hook(reshard_after_validation)


def layer_precision(reduced: torch.dtype | None) -> MixedPrecisionPolicy:
    """Matrices of layers travel in the precision to which autocast would cast them on arrival.

    Norms and biases travel in float32, gradients too: numbers are those of ddp. torch before 2.15
    cannot tell them apart; there all is float32.
    """
    if "param_dtype_override_fn" not in MixedPrecisionPolicy.__dataclass_fields__:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=reduced,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda p: p.dtype if p.numel() == max(p.shape) else None,
    )


def reshard_after_validation(loss_module: Any, *_: Any) -> None:
    """Without a backward pass nobody else gives back what the forward pass has gathered."""
    if not torch.is_grad_enabled():
        for module in loss_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """True where processes hold shards of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def accumulating(loss_module: nn.Module, more_to_come: bool) -> Iterator[None]:
    """While more passes of a step are to come, gradients stay with their process."""
    if isinstance(loss_module, FSDPModule):
        loss_module.set_requires_gradient_sync(not more_to_come)
        yield
    elif more_to_come and isinstance(loss_module, nn.parallel.DistributedDataParallel):
        with loss_module.no_sync():
            yield
    else:
        yield


def full_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies in host memory for the main process, {} for the others; collective."""
    whole = full(named)
    return whole if is_main() else {}


def load_full_tensors(named: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Puts whole tensors, which every process has, into those of the run, shards or not."""
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(like(tensor, whole[name]))


def full_optimizer_state(run: Run) -> dict[str, Any]:
    """The optimizer's state_dict as one process would have it, on the main process; collective."""
    state = full(run.optimizer.state_dict())
    return state if is_main() else {}


def load_optimizer_state(run: Run, state: dict[str, Any]) -> None:
    """Goes on with full_optimizer_state's, which every process has; of any number of processes."""
    if is_sharded(run.model):
        make_states(run.optimizer)
        state = like(run.optimizer.state_dict(), state)
    run.optimizer.load_state_dict(state)


@contextmanager
def whole_model(run: Run) -> Iterator[TokenTransformer | None]:
    """The model that pictures are made with, averaged where there is an EMA; collective.

    On the main process it is there for anything that runs it, in eval mode: a copy where weights
    are sharded, else the run's own. The other processes get None.
    """
    model, ema = run.model, run.ema
    if is_sharded(model):
        weights = full_tensors(model.state_dict() | (ema.shadow if ema is not None else {}))
        where = run.accelerator.device
        yield (
            type(model).from_state(model.config_dict(), weights, "").to(where) if weights else None
        )
        return
    was_training = model.training
    if ema is not None:
        ema.swap_in(model)
    try:
        yield model.eval() if is_main() else None
    finally:
        model.train(was_training)
        if ema is not None:
            ema.swap_out(model)


def full(value: Any) -> Any:
    """The same dictionaries and lists, with whole copies of tensors in host memory; collective.

    Processes other than the main one help, and have None in place of tensors.
    """
    if isinstance(value, dict):
        return {key: full(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(full(item) for item in value)
    if isinstance(value, DTensor):
        whole = value.full_tensor().detach()
        return whole.cpu() if is_main() else None
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True) if is_main() else None
    return value


def like(template: Any, whole: Any) -> Any:
    """`whole`, of tensors or of dictionaries and lists of them, sharded as the template is."""
    if isinstance(template, DTensor):
        placed = whole.to(template.device, template.dtype)
        return distribute_tensor(
            placed, template.device_mesh, template.placements, src_data_rank=None
        )
    if isinstance(template, dict):
        return {key: like(template.get(key), item) for key, item in whole.items()}
    if isinstance(template, list | tuple):
        return type(whole)(like(*pair) for pair in zip(template, whole, strict=True))
    return whole


def make_states(optimizer: Optimizer) -> None:
    """Lets the optimizer make its states, by a step with rate 0: weights stay as they are."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper looks at a scaler
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def is_main() -> bool:
    """True on the process that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0
