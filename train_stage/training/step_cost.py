"""What one optimizer step costs in operations and memory, counted by taking it (steps 6 and 7).

The step is the training path itself, on tensors that have shapes, dtypes and storages but no data:
it takes seconds and no memory, whatever the size. Every storage is counted as it comes and goes.
Not counted: what kernels and libraries take for themselves, and what an allocator leaves unused.
"""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from train_stage.models.token_transformer import TokenTransformer
from train_stage.objective.loss import MaskedLoss
from train_stage.training.ema import EMA
from train_stage.training.optimizer import make_optimizer

Device = Literal["cuda", "cpu"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Step:
    """What a process does between two updates: forward passes of `rows` rows."""

    rows: int
    length: int  # T, tokens of a row
    scored: int  # codes of a pass that are scored
    passes: int = 1
    precision: Literal["no", "fp16", "bf16"] = "no"
    optimizer: str = "adamw"
    use_ema: bool = False
    label_smoothing: float = 0.0
    condition: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shape of a row, by name
    soft_codes: int = 0  # codes of a soft target
    predicts_first: float = 0.0  # share of the steps, of a self-conditioned model
    judged: int = 0  # codes of a row that a self-critic judges


@dataclass
class StepCost:
    """Operations (a multiplication and an addition are two) and bytes, of one process."""

    flops: int  # of all passes, forward and backward, recomputed layers included
    update_flops: int  # of the optimizer
    weights: int
    gradients: int
    optimizer: int  # its state
    ema: int
    activations: int  # what a forward pass leaves for its backward pass, cast weights among it
    peak: int  # the most that there is at once


def count_step(model: TokenTransformer, step: Step, device: Device = "cuda") -> StepCost:
    """Takes a step with a copy of `model`, which may be on the meta device, in training mode.

    device: whose kernels and mixed precision are followed; none need be there.
    """
    ledger = Ledger()
    with no_data(), ledger:
        model = without_data(model).train()
        weights = ledger.bytes
        ema = EMA(model) if step.use_ema else None
        averaged = ledger.bytes - weights
        optimizer = optimizer_of(model, step.optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # makes its state
        optimizer.zero_grad()
        state = ledger.bytes - weights - averaged
        loss_module, inputs = MaskedLoss(model, step.label_smoothing), make_inputs(step)
        if device == "cuda":
            for module in (loss_module, *model.layers()):  # layers: to recompute them alike
                module.forward = like_gpu(module.forward)  # type: ignore[method-assign]
        ledger.peak, ledger.flops = ledger.bytes, 0
        if step.predicts_first:  # without gradients: never where memory is fullest
            predict(loss_module, step, inputs)
        first = round(step.predicts_first * ledger.flops)
        for _ in range(min(step.passes, 2)):  # further ones are like the second
            bytes_before, ledger.flops = ledger.bytes, 0
            with autocast(step.precision):
                total = loss_module(**inputs)["total"]
            activations = ledger.bytes - bytes_before
            total.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        flops, ledger.flops = (ledger.flops + first) * step.passes, 0
        optimizer.step()
        if ema is not None:
            ema.update(model)
    sizes = (weights, gradients, state, averaged, activations, ledger.peak)
    return StepCost(flops, ledger.flops, *sizes)


def no_data() -> FakeTensorMode:
    """The mode inside which no tensor has data."""
    # It pretends that there is a GPU, and autograd would start a thread for that: too many for
    # processes that are forked later. So autograd is to look around before.
    torch.ones((), requires_grad=True).backward()
    return FakeTensorMode(allow_non_fake_inputs=True)


def without_data(model: TokenTransformer) -> TokenTransformer:
    """A copy whose weights have no data, inside no_data."""
    state = {name: torch.empty_like(t, device="cpu") for name, t in model.state_dict().items()}
    model = copy.deepcopy(model)
    model.load_state_dict(state, assign=True)
    return model


def make_inputs(step: Step) -> dict[str, Tensor]:
    """The keywords of MaskedLoss for one pass; the values mean nothing."""

    def ids(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long)

    made = {
        "input_ids": ids(step.rows, step.length),
        "labels": ids(step.rows, step.length),
        "positions": ids(step.scored),
        **{name: torch.zeros(step.rows, *row) for name, row in step.condition.items()},
    }
    if step.soft_codes:
        made["soft_ids"] = ids(step.scored, step.soft_codes)
        made["soft_weights"] = torch.zeros(step.scored, step.soft_codes)
    if step.judged:
        made |= {"bucket": ids(step.scored), "codes": ids(step.rows, step.judged)}
        made |= {"draw": torch.zeros(step.scored), "critic_weight": torch.zeros(step.rows)}
    return made


def predict(loss_module: MaskedLoss, step: Step, inputs: dict[str, Tensor]) -> None:
    """The forward pass whose prediction a self-conditioned model is given."""
    given = {name: inputs[name] for name in ("input_ids", *step.condition)}
    with autocast(step.precision):
        loss_module.predict(given, inputs["positions"], inputs["input_ids"])


def optimizer_of(model: TokenTransformer, name: str) -> Optimizer:
    """The run's optimizer; what needs a library and a GPU stood in for."""
    if name == "8bit_adamw":
        return EightBitStates(model.parameters(), {})
    return make_optimizer(model, name, 1e-3, (0.9, 0.999), 0.01, 1e-8)


class EightBitStates(Optimizer):
    """The states of bitsandbytes' AdamW8bit: bytes with a scale for 256 each; small ones float32.

    Source: Dettmers et al. 2022, and the defaults of that library (min_8bit_size).
    """

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            size, state = parameter.numel(), self.state[parameter]
            if not state and size < 4096:
                state["moments"] = torch.zeros(2, size)
            elif not state:
                state["moments"] = torch.zeros(2, size, dtype=torch.uint8)
                state["scales"] = torch.zeros(2, -(-size // 256))


def autocast(precision: str) -> torch.autocast:
    """Mixed precision for tensors that say they are on a CPU."""
    return torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST)


class Ledger(TorchDispatchMode):
    """Counts operations, the bytes of the storages that exist, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # an optimizer asks for the number of its step
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def like_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run inside LikeGPU."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with LikeGPU():
            return function(*args, **kwargs)

    return inside


class LikeGPU(TorchFunctionMode):
    """Sends a CPU's tensors the ways of a GPU, where those keep other things in memory."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return GPU_WAYS.get(func, func)(*args, **(kwargs or {}))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, **_: Any
) -> Tensor:
    """Without the matrix of attention weights; a CPU has it where there is dropout."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p)[0]


def _dropout(input: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """One byte for every value; a CPU keeps a factor."""
    return torch.native_dropout(input, p, training)[0] if training and p else input


def _layer_norm(
    input: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """In float32, whatever mixed precision made of the input."""
    if torch.is_autocast_enabled("cpu"):
        input, weight = input.float(), None if weight is None else weight.float()
    return F.layer_norm(input, shape, weight, bias, eps)


def _rms_norm(
    input: Tensor, shape: list[int], weight: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """In one kernel that keeps what a layer norm's keeps."""
    return _layer_norm(input, shape, weight, None, eps)


GPU_WAYS: dict[Callable, Callable] = {
    F.scaled_dot_product_attention: _attention,
    F.dropout: _dropout,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}
