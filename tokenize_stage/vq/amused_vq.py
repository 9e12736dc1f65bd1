"""aMUSEd's VQModel (diffusers) <-> our VQGANModel: config, names of the weights, folders.

The same function under other names. diffusers numbers the decoder's levels from the coarsest, we
from the finest as taming does. Beside step 3 of the flow: models in, models out.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from storage.interchange import backwards, rename, write_diffusers_model
from storage.pretrained import find_model, read_config, read_weights
from tokenize_stage.vq.blocks import GROUPS
from tokenize_stage.vq.vqgan import VQGANModel

State = dict[str, Tensor]
SAME_FIELDS = {  # ours: theirs
    "num_channels": "in_channels",
    "num_res_blocks": "layers_per_block",
    "z_channels": "latent_channels",
    "num_embeddings": "num_vq_embeddings",
}
ATTENTION = [
    ("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")
]  # fmt: skip
THEIR_DEFAULTS: dict[str, Any] = {  # of the fields read here; diffusers' own
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
    "mid_block_add_attention": True,
}
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


def config_from_amused(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers VQModel's config.json as ours. Raises ValueError for another function.

    `sample_size` and `scaling_factor`, which the VQ model does not use, are left out.
    """
    theirs = THEIR_DEFAULTS | config
    widths, narrow = theirs["block_out_channels"], theirs["block_out_channels"][0]
    computed = {
        "act_fn": "silu",
        "norm_num_groups": GROUPS,
        "norm_type": "group",
        "out_channels": theirs["in_channels"],
        "down_block_types": [DOWN] * len(widths),
        "up_block_types": [UP] * len(widths),
        "block_out_channels": [width // narrow * narrow for width in widths],
    }
    odd = {key: theirs[key] for key in computed if theirs.get(key, computed[key]) != computed[key]}
    if odd:
        raise ValueError(f"this VQModel has {odd}; VQGANModel computes {computed}")
    return {
        **{ours: theirs[name] for ours, name in SAME_FIELDS.items()},
        "quantized_embed_dim": theirs["vq_embed_dim"] or theirs["latent_channels"],
        "hidden_channels": narrow,
        "channel_mult": tuple(width // narrow for width in widths),
        "attn_resolutions": (),
        "no_attn_mid_block": not theirs["mid_block_add_attention"],
    }


def config_to_amused(config: dict[str, Any]) -> dict[str, Any]:
    """Our config.json as a diffusers VQModel's. Raises ValueError for a function it lacks."""
    mult = config["channel_mult"]
    sides = {config["resolution"] >> level for level in range(len(mult))}
    odd = []
    if sides & set(config["attn_resolutions"]):
        odd.append(f"attention in levels (attn_resolutions={list(config['attn_resolutions'])})")
    if config.get("symmetric_pixels"):
        odd.append("pixels in [-1, 1] (symmetric_pixels=true)")
    if not config["resample_with_conv"]:
        odd.append("resampling without convolutions (resample_with_conv=false)")
    if mult[0] != 1:
        odd.append(f"a first level of other width than hidden_channels (channel_mult={list(mult)})")
    if odd:
        raise ValueError(f"diffusers' VQModel as aMUSEd uses it has no {'; no '.join(odd)}")
    embed = config["quantized_embed_dim"]
    return {
        "_class_name": "VQModel",
        **{theirs: config[name] for name, theirs in SAME_FIELDS.items()},
        "out_channels": config["num_channels"],
        "vq_embed_dim": None if embed == config["z_channels"] else embed,
        "block_out_channels": [config["hidden_channels"] * m for m in mult],
        "down_block_types": [DOWN] * len(mult),
        "up_block_types": [UP] * len(mult),
        "mid_block_add_attention": not config["no_attn_mid_block"],
        "act_fn": "silu",
        "norm_num_groups": GROUPS,
        "norm_type": "group",
        "lookup_from_codebook": True,  # AmusedPipeline hands over codes
        "force_upcast": True,  # and decodes in float32
    }


def state_from_amused(state: State) -> State:
    """A VQModel's weights under our names."""
    names = rename(state, backwards(name_pairs(_count_levels(state, "encoder.down_blocks."))))
    return {ours: _reshaped(state[name], ours, 4) for name, ours in names.items()}


def state_to_amused(state: State) -> State:
    """Our weights under VQModel's names."""
    names = rename(state, name_pairs(_count_levels(state, "encoder.down.")))
    return {theirs: _reshaped(state[name], name, 2) for name, theirs in names.items()}


def name_pairs(levels: int) -> list[tuple[str, str]]:
    """(our module, theirs) for a model of so many levels."""
    pairs = [(name, name) for name in ("quantize.embedding", "quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        parts = [("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")]
        parts += [(f"mid.block_{i + 1}", f"mid_block.resnets.{i}") for i in (0, 1)]
        parts += [(f"mid.attn_1.{a}", f"mid_block.attentions.0.{b}") for a, b in ATTENTION]
        for i in range(levels):
            ours, theirs = f"down.{i}", f"down_blocks.{i}"
            if half == "decoder":
                ours, theirs = f"up.{i}", f"up_blocks.{levels - 1 - i}"
            parts += [
                (f"{ours}.block.{{}}.nin_shortcut", f"{theirs}.resnets.{{}}.conv_shortcut"),
                (f"{ours}.block.{{}}", f"{theirs}.resnets.{{}}"),
                (f"{ours}.downsample.conv", f"{theirs}.downsamplers.0.conv"),
                (f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv"),
            ]
        pairs += [(f"{half}.{ours}", f"{half}.{theirs}") for ours, theirs in parts]
    return pairs


def load_amused_vq(
    name_or_path: str | Path, subfolder: str | None = None, revision: str | None = None
) -> VQGANModel:
    """A diffusers VQModel (folder or hub name) as a frozen VQGANModel in eval mode.

    Raises ValueError for a VQModel of another function, and for weights that do not fit.
    """
    folder = find_model(name_or_path, subfolder, revision)
    config = config_from_amused(read_config(folder))
    model = VQGANModel.from_state(config, state_from_amused(read_weights(folder)), str(folder))
    return model.requires_grad_(False)


def save_amused_vq(model: VQGANModel, folder: Path) -> None:
    """Writes `model` as a diffusers VQModel. Raises ValueError for a function that it lacks."""
    config = config_to_amused(asdict(model.config))
    write_diffusers_model(folder, config, state_to_amused(model.state_dict()))


def _count_levels(state: State, prefix: str) -> int:
    start = len(prefix)
    return len({name[start:].split(".")[0] for name in state if name.startswith(prefix)})


def _reshaped(tensor: Tensor, ours: str, dims: int) -> Tensor:
    """The weights of attention: 1x1 convolutions here (4 dims), linear layers there (2 dims)."""
    if ".attn_1." not in ours or tensor.ndim == 1:
        return tensor
    return tensor[:, :, None, None] if dims == 4 else tensor.flatten(1)
