"""MaskGIT's published tokenizer (JAX, a flax msgpack checkpoint) -> MaskGitVQGAN.

flax numbers modules of a kind in the order in which they are called (Conv_0, ResBlock_7): the table
here walks that order (google-research/maskgit, nets/vqgan_tokenizer.py). Convolutions are HWIO
there, OIHW here. Beside step 3 of the flow: models in, models out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.interchange import rename
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

State = dict[str, Tensor]
NDARRAY = 1  # flax's msgpack extension type of an array
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
RES_BLOCK = [  # (flax, ours)
    ("GroupNorm_0", "norm1"),
    ("Conv_0", "conv1"),
    ("GroupNorm_1", "norm2"),
    ("Conv_1", "conv2"),
    ("Conv_2", "nin_shortcut"),
]


def load_maskgit_jax(path: str | Path, resolution: int = 256) -> tuple[MaskGitVQGAN, list[str]]:
    """The model, frozen and in eval mode, and in words what else the file holds.

    resolution: side of the pictures it was trained on, which the file does not say.
    Raises ValueError for a file that is no such checkpoint or when `msgpack` is not installed.
    """
    tree = read_flax(Path(path))
    params = tree.get("params", {})
    if set(params) != {"encoder", "decoder", "quantizer"}:
        raise ValueError(
            f"{path} is no MaskGIT tokenizer, whose params are encoder, decoder and quantizer: it "
            f"has {sorted(params) or sorted(tree)}. (MaskGIT's transformer is not converted.)"
        )
    flax = dict(_leaves(params))
    try:
        config = infer_config(flax) | {"resolution": resolution}
    except KeyError as error:
        raise ValueError(f"{path} is no MaskGIT tokenizer: no {error}") from None
    names = rename(flax, name_pairs(len(config["channel_mult"]), config["num_res_blocks"]))
    state = {names[name]: tensor for name, tensor in flax.items()}
    model = MaskGitVQGAN.from_state(config, state, str(path)).requires_grad_(False)
    return model, [f"{key} (beside the weights)" for key in tree if key != "params"]


def read_flax(path: Path) -> dict[str, Any]:
    """The tree of dicts that flax.serialization wrote; arrays become tensors.

    Raises ValueError for another file or an array of another type than float32, float16, bfloat16.
    """
    try:
        import msgpack
    except ImportError:
        raise ValueError(
            "reading flax files needs msgpack: pip install open-muse[convert]"
        ) from None

    def decode(code: int, data: bytes) -> Any:
        if code != NDARRAY:
            return None  # a scalar such as the step: never a weight
        shape, dtype, content = msgpack.unpackb(data)
        if dtype not in DTYPES:
            return None
        return torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).reshape(shape)

    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=decode, strict_map_key=False)
    except (ValueError, RuntimeError, msgpack.UnpackException) as error:
        raise ValueError(f"{path} is no flax checkpoint: {error!r}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no flax checkpoint, but a {type(tree).__name__}")
    return tree


def infer_config(flax: State) -> dict[str, Any]:
    """MaskGitVQGAN's config from the names and shapes of flax's weights."""
    hidden = flax["encoder.Conv_0.weight"].shape[0]
    levels = len(_numbered(flax, "decoder.Conv_")) - 1  # one up each but one, one in, one out
    blocks = len(_numbered(flax, "encoder.ResBlock_")) // (levels + 1)  # the middle is like a level
    widths = [len(flax[f"encoder.ResBlock_{i * blocks}.Conv_0.weight"]) for i in range(levels)]
    codes, dim = flax["quantizer.codebook"].shape
    return {
        "num_channels": flax["encoder.Conv_0.weight"].shape[1],
        "hidden_channels": hidden,
        "channel_mult": tuple(width // hidden for width in widths),
        "num_res_blocks": blocks,
        "z_channels": dim,
        "num_embeddings": codes,
        "quantized_embed_dim": dim,
    }


def name_pairs(levels: int, blocks: int) -> list[tuple[str, str]]:
    """(flax's name, ours) in the order in which the model calls its modules."""
    each, up = range(blocks), list(reversed(range(levels)))
    middle = [f"mid.{j}" for j in each]
    order = {
        "encoder": [f"down.{i}.block.{j}" for i in range(levels) for j in each] + middle,
        "decoder": middle + [f"up.{i}.block.{j}" for i in up for j in each],
    }
    convolutions = {
        "encoder": ["conv_in", "conv_out"],
        "decoder": ["conv_in", *(f"up.{i}.upsample_conv" for i in up[:-1]), "conv_out"],
    }
    pairs = [("quantizer.codebook", "quantize.embedding.weight")]
    for half in ("encoder", "decoder"):
        parts = [("GroupNorm_0", "norm_out")]
        parts += [(f"Conv_{n}", ours) for n, ours in enumerate(convolutions[half])]
        for n, ours in enumerate(order[half]):
            parts += [(f"ResBlock_{n}.{a}", f"{ours}.{b}") for a, b in RES_BLOCK]
        pairs += [(f"{half}.{a}", f"{half}.{b}") for a, b in parts]
    return pairs


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of every leaf: kernels and scales as `weight`, HWIO as OIHW."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, Tensor):
            raise ValueError(f"{prefix}{key} is no array of {', '.join(DTYPES)}")
        else:
            name = "weight" if key in ("kernel", "scale") else key
            yield f"{prefix}{name}", value.permute(3, 2, 0, 1) if value.ndim == 4 else value


def _numbered(state: State, prefix: str) -> set[str]:
    """The numbers that follow `prefix` in the names."""
    return {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
