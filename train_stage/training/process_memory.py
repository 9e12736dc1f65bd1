"""Memory of one process of a run, by kind: what a step needs, shared among processes (step 7).

Part of `muse-train --dry-run`. Sharded as parallel.py does it.
"""

from torch import nn

from train_stage.models.sizes import count_parameters
from train_stage.models.token_transformer import TokenTransformer
from train_stage.training.config import TrainingConfig
from train_stage.training.step_cost import StepCost

PEAK = "at most at once"
FLOAT32 = 4


def process_memory(
    cost: StepCost,
    model: TokenTransformer,
    config: TrainingConfig,
    processes: int,
    passes: int,
    optimizer: str,
    text: int,
) -> dict[str, int]:
    """Bytes by name; `cost` is that of a process by itself, `text` the weights of text encoders."""
    is_sharded = config.parallel == "fsdp" and processes > 1
    parts = (cost.weights, cost.optimizer, cost.ema)
    gathered, gradients = 0, cost.gradients
    rest = cost.peak - sum(parts)  # activations, and gradients where those are there, too
    if is_sharded:
        share = 0.0 if config.fsdp.cpu_offload else 1 / processes
        parts = tuple(round(share * size) for size in parts)  # type: ignore[assignment]
        gathered = gathered_weights(model, config)
        if passes == 1:  # while passes are to come, gradients stay whole
            gradients = round(share * gradients)
            rest = max(cost.activations, rest - cost.gradients + gradients)
    elif processes > 1 and passes == 1:
        rest += gradients  # they are views of buckets, which are there from the start
    weights, state, ema = parts
    return {
        "weights": weights,
        "gradients": gradients,
        f"{optimizer} state": state,
        "moving average": ema,
        "gathered weights": gathered,
        "text encoders": text,
        "activations of a pass": cost.activations,
        PEAK: sum(parts) + gathered + rest + text,
    }


def gathered_weights(model: TokenTransformer, config: TrainingConfig) -> int:
    """What FSDP has whole at a time: all but the layers, in float32, and two layers, or all."""
    layers = [count_parameters(layer) for layer in model.layers()]
    outside = count_parameters(model) - sum(layers)
    inside = 2 * max(layers) if config.fsdp.reshard_after_forward else sum(layers)
    return FLOAT32 * outside + (FLOAT32 if config.mixed_precision == "no" else 2) * inside


def parts_of(model: TokenTransformer) -> dict[str, int]:
    """Parameters by part."""
    parts = {
        "embeddings": model.get_submodule("embed"),
        "layers": nn.ModuleList(model.layers()),
        "head": getattr(model, "mlm_layer", None) or model.get_submodule("to_logits"),
    }
    counts = {name: count_parameters(part) for name, part in parts.items()}
    return counts | {"other": count_parameters(model) - sum(counts.values())}
