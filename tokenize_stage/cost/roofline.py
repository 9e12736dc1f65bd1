"""Upper bounds of an encoder's images/s on a GPU that is not here, computed from its operations.

Each operation takes as long as its arithmetic or its bytes, whichever is longer; no kernel reaches
that. Counted by running the model on tensors without data, so it holds for any tokenizer.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tokenize_stage.vq.model import VQModel

ROWS = 8  # of the batch that is counted: weights are read once for all of them
NORMS = {"native_group_norm", "native_layer_norm", "native_batch_norm"}
POINTWISE = {"silu", "gelu", "relu", "sigmoid", "add", "sub", "mul", "div", "_to_copy", "clone"}


@dataclass(frozen=True)
class GPU:
    """Operations (a multiplication and an addition are two) and bytes a second."""

    half_flops: float
    float32_flops: float
    bytes_per_s: float


GPUS = {
    # Dense half precision and memory as large products and copies reach them; float32 without
    # TF32 as in the data sheet.
    "H100": GPU(800e12, 67e12, 3.0e12),
    # The data sheet of the 80 GB SXM module.
    "A100": GPU(312e12, 19.5e12, 2.0e12),
}


@dataclass(frozen=True)
class Operation:
    """One call: bytes are those of all tensors in and out; fused_bytes those that are left when
    what is pointwise is computed on the way, and a norm reads its input twice."""

    flops: int
    bytes: int
    fused_bytes: int


@torch.no_grad()
def encoder_operations(model: VQModel, resolution: int, dtype: torch.dtype) -> list[Operation]:
    """Of a batch of ROWS images through encoder and codebook; the model is not changed."""
    shape = (ROWS, model.num_channels, resolution, resolution)
    count = _Count()
    state = {
        name: torch.empty_like(
            value, device="meta", dtype=dtype if value.is_floating_point() else None
        )
        for name, value in model.state_dict().items()
    }
    pixels = torch.empty(shape, device="meta", dtype=dtype)
    with count:
        torch.func.functional_call(
            _Latents(model), {f"model.{k}": v for k, v in state.items()}, (pixels,)
        )
    vectors, width = ROWS * math.prod(model.grid(resolution)), model.quantizer.vectors.shape[1]
    search = 2 * vectors * width * model.codebook_size  # in float32; distances stay on the chip
    read = 4 * (vectors + model.codebook_size) * width
    return [*count.operations, Operation(search, read, read)]


def images_per_s(operations: list[Operation], gpu: GPU, is_half: bool, is_fused: bool) -> float:
    """The bound: the sum of what each operation takes at least."""
    flops_per_s = gpu.half_flops if is_half else gpu.float32_flops
    seconds = 0.0
    for operation in operations:
        size = operation.fused_bytes if is_fused else operation.bytes
        seconds += max(operation.flops / flops_per_s, size / gpu.bytes_per_s)
    return ROWS / seconds


class _Latents(torch.nn.Module):
    """A VQ model's way to its latents, as a module's forward."""

    def __init__(self, model: VQModel):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.latents(pixels)


class _Count(TorchDispatchMode):
    """Notes what every operation computes, reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.is_view:
            return made
        packet = func._overloadpacket
        read = [t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t.nbytes for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        counter = flop_registry.get(packet)
        flops = counter(*args, **(kwargs or {}), out_val=made) if counter else 0
        size = fused = sum(read) + sum(written)
        if packet.__name__ in POINTWISE:
            fused = sum(read[1:])
        elif packet.__name__ in NORMS:
            fused += read[0]
        self.operations.append(Operation(flops, size, fused))
        return made
