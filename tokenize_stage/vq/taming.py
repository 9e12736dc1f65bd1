"""taming-transformers' VQGAN checkpoints (Lightning .ckpt) -> VQGANModel.

Names are the same; the config, which they keep in another file, is read off names and shapes.
Their models see pixels in [-1, 1]: ours is set to symmetric_pixels. No code of the file is run.
Beside step 3 of the flow: models in, models out.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from tokenize_stage.vq.torch_file import read_torch_file
from tokenize_stage.vq.vqgan import VQGANModel

State = dict[str, Tensor]
TRAINING_ONLY = ("loss.", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")


def load_taming(path: str | Path, resolution: int = 256) -> tuple[VQGANModel, list[str]]:
    """The model, frozen and in eval mode, and in words what else the file holds.

    resolution: side of the pictures it was trained on (`ddconfig.resolution` in its YAML), by which
    our config says which levels have attention.
    Raises ValueError for a file that is no such checkpoint, or one of another kind of VQGAN.
    """
    content = read_torch_file(Path(path))
    found = content if isinstance(content, dict) else {}
    found = found.get("state_dict", found)
    state = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    dropped = [name for name in state if name.startswith(TRAINING_ONLY)]
    left_out = [f"{name} (beside the weights)" for name in found if name not in state]
    if found is not content:
        left_out += [f"{key} (beside the weights)" for key in content if key != "state_dict"]
    if dropped:
        parts = {".".join(name.split(".")[:2]) for name in dropped}
        left_out.append(f"{len(dropped)} tensors for training only: {', '.join(sorted(parts))}")
    weights = {name: state[name] for name in state if name not in dropped}
    try:
        config = infer_config(weights, resolution, str(path))
    except KeyError as error:
        begins = ", ".join(list(weights)[:5]) or "no tensor at all"
        raise ValueError(f"{path} is no taming VQGAN: no {error}; it has {begins} …") from None
    return VQGANModel.from_state(config, weights, str(path)).requires_grad_(False), left_out


def infer_config(state: State, resolution: int, where: str) -> dict[str, Any]:
    """VQGANModel's config from the names and shapes of its weights.

    Raises ValueError for another kind of VQGAN, KeyError for no VQGAN at all.
    """
    _refuse_other_kinds(state, where)
    down = _numbers(state, "encoder.down.")
    blocks = _numbers(state, "encoder.down.0.block.")
    hidden = len(state["encoder.conv_in.weight"])
    widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(down)]
    if any(width % hidden for width in widths):
        raise ValueError(f"{where}: level widths {widths} are no multiples of the first, {hidden}")
    attending = [i for i in range(down) if f"encoder.down.{i}.attn.0.q.weight" in state]
    if attending and blocks == 1:
        raise ValueError(
            f"{where} has attention in levels of a single residual block: taming applies it, "
            "VQGANModel, true to the published weights of open-muse, does not"
        )
    return {
        "resolution": resolution,
        "num_channels": state["encoder.conv_in.weight"].shape[1],
        "hidden_channels": hidden,
        "channel_mult": tuple(width // hidden for width in widths),
        "num_res_blocks": blocks,
        "attn_resolutions": tuple(resolution >> i for i in attending),
        "no_attn_mid_block": "encoder.mid.attn_1.q.weight" not in state,
        "z_channels": state["decoder.conv_in.weight"].shape[1],
        "num_embeddings": len(state["quantize.embedding.weight"]),
        "quantized_embed_dim": state["quantize.embedding.weight"].shape[1],
        "resample_with_conv": "decoder.up.1.upsample.conv.weight" in state,
        "symmetric_pixels": True,
    }


def _refuse_other_kinds(state: State, where: str) -> None:
    if "quantize.embed.weight" in state:
        raise ValueError(
            f"{where} is a Gumbel VQGAN (quantize.embed, quantize.proj): its codes are the largest "
            "of projected logits, not the nearest codebook vector, so VQGANModel cannot compute it"
        )
    if "quantize.used" in state:
        raise ValueError(f"{where} renumbers its codes (quantize.used), which VQGANModel cannot")


def _numbers(state: State, prefix: str) -> int:
    """How many different numbers follow `prefix` in the names."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
