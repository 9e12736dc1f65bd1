"""aMUSEd's UVit2DModel (diffusers) <-> our MaskGiTUViT: config, names of the weights, folders.

The same function under other names; of the gated feed-forward diffusers keeps one matrix,
[linear half; GELU half], for our two. Beside step 7 of the flow: models in, models out.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.interchange import backwards, rename, write_diffusers_model
from storage.pretrained import find_model, read_config, read_weights
from train_stage.models.model_fields import ExtensionFields
from train_stage.models.uvit import MaskGiTUViT

State = dict[str, Tensor]
SAME_FIELDS = (
    "attention_dropout block_num_heads codebook_size cond_embed_dim encoder_hidden_size "
    "hidden_dropout hidden_size in_channels intermediate_size layer_norm_eps ln_elementwise_affine "
    "micro_cond_embed_dim micro_cond_encode_dim num_attention_heads num_hidden_layers "
    "num_res_blocks use_bias vocab_size"
).split()  # their defaults are the same, too
SAME_NAMES = (
    "encoder_proj encoder_proj_layer_norm embed.embeddings embed.layer_norm embed.conv "
    "project_to_hidden_norm project_to_hidden project_from_hidden_norm project_from_hidden "
    "mlm_layer.conv1 mlm_layer.conv2"
).split()
RES_BLOCK = [  # (our module, theirs)
    ("depthwise", "depthwise"),
    ("norm.norm", "norm"),
    ("channelwise.0", "channelwise_linear_1"),
    ("channelwise.2", "channelwise_norm"),
    ("channelwise.4", "channelwise_linear_2"),
    ("adaLN_modulation.mapper", "cond_embeds_mapper"),
]
ATTENTION = [
    (f"{ours}.{a}", f"{theirs}.{b}")
    for ours, theirs in (("attention", "attn1"), ("crossattention", "attn2"))
    for a, b in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0"))
]
TEXT_ATTENTION = [
    ("kv_mapper", "kv_mapper"),
    ("attn_layer_norm", "norm1"),
    ("crossattn_layer_norm", "norm2"),
    *ATTENTION,
]
LAYER = [
    ("attn_layer_norm", "norm1.norm"),
    ("self_attn_adaLN_modulation.mapper", "norm1.linear"),
    ("crossattn_layer_norm", "norm2.norm"),
    ("cross_attn_adaLN_modulation.mapper", "norm2.linear"),
    ("ffn.pre_mlp_layer_norm", "norm3.norm"),
    ("ffn.adaLN_modulation.mapper", "norm3.linear"),
    ("ffn.wi", "ff.net.0.proj"),  # wi_1 and wi_0 in one, see _joined
    ("ffn.wo", "ff.net.2"),
    *ATTENTION,
]


def name_pairs() -> list[tuple[str, str]]:
    """(our module, theirs), `{}` for a number."""
    pairs = [(name, name) for name in SAME_NAMES]
    pairs += [("mlm_layer.layer_norm.norm", "mlm_layer.layer_norm")]
    pairs += [("cond_embed.0", "cond_embed.linear_1"), ("cond_embed.2", "cond_embed.linear_2")]
    parts = [("transformer_layers.{}", "transformer_layers.{}", LAYER)]
    for way in ("down", "up"):
        ours, theirs = f"{way}_blocks.0", f"{way}_block"
        parts += [
            (f"{ours}.res_blocks.{{}}", f"{theirs}.res_blocks.{{}}", RES_BLOCK),
            (f"{ours}.attention_blocks.{{}}", f"{theirs}.attention_blocks.{{}}", TEXT_ATTENTION),
            (f"{ours}.{way}sample", f"{theirs}.{way}sample", [("0.norm", "norm"), ("1", "conv")]),
        ]
    return pairs + [(f"{a}.{m}", f"{b}.{n}") for a, b, table in parts for m, n in table]


def config_from_amused(config: dict[str, Any]) -> dict[str, Any]:
    """A UVit2DModel's config.json as ours. Raises ValueError for another function.

    `sample_size`, the side of the grid made by default, has no place in ours and is left out.
    """
    down, up = config.get("downsample", False), config.get("upsample", False)
    if down != up:
        raise ValueError(f"downsample={down}, upsample={up}: MaskGiTUViT does both or neither")
    ours = {name: config[name] for name in SAME_FIELDS if name in config}
    ours["force_down_up_sample"] = down
    ours["block_out_channels"] = (config.get("block_out_channels", 768),)
    _check_norms(ours)
    return ours


def config_to_amused(config: dict[str, Any], sample_size: int | None = None) -> dict[str, Any]:
    """Our config.json as a UVit2DModel's. Raises ValueError for a function it lacks.

    sample_size: side of the grid that AmusedPipeline makes when not told. None: as published, 16,
    or 32 where the transformer halves its grid.
    """
    computed = {"use_fused_mlp": False, "norm_type": "rmsnorm", **asdict(ExtensionFields())}
    for key, only in computed.items():
        if config.get(key, only) != only:
            raise ValueError(f"diffusers' UVit2DModel has no {key}={config[key]}, only {only}")
    _check_norms(config)
    halves = config["force_down_up_sample"]
    return {
        "_class_name": "UVit2DModel",
        **{name: config[name] for name in SAME_FIELDS},
        "block_out_channels": config["block_out_channels"][0],
        "downsample": halves,
        "upsample": halves,
        "sample_size": sample_size or (32 if halves else 16),
    }


def state_from_amused(state: State) -> State:
    """A UVit2DModel's weights under our names. Raises ValueError listing unknown names."""
    names = rename(state, backwards(name_pairs()))
    ours = {}
    for name, tensor in ((names[name], tensor) for name, tensor in state.items()):
        if ".ffn.wi." in name:
            linear, gelu = tensor.chunk(2)
            ours[name.replace(".wi.", ".wi_0.")] = gelu
            ours[name.replace(".wi.", ".wi_1.")] = linear
        else:
            ours[name] = tensor
    return ours


def state_to_amused(state: State) -> State:
    """Our weights under UVit2DModel's names. Raises ValueError listing unknown names."""
    joined = {}
    for name, tensor in state.items():
        gelu = name.replace(".wi_1.", ".wi_0.")
        if ".ffn.wi_1." in name and gelu in state:
            joined[name.replace(".wi_1.", ".wi.")] = torch.cat([tensor, state[gelu]])
        elif ".ffn.wi_0." not in name or name.replace(".wi_0.", ".wi_1.") not in state:
            joined[name] = tensor
    names = rename(joined, name_pairs())
    return {names[name]: tensor for name, tensor in joined.items()}


def load_amused_transformer(
    name_or_path: str | Path, subfolder: str | None = None, revision: str | None = None
) -> MaskGiTUViT:
    """A diffusers UVit2DModel (folder or hub name) as a MaskGiTUViT in eval mode.

    Raises ValueError for a UVit2DModel of another function, and for weights that do not fit.
    """
    folder = find_model(name_or_path, subfolder, revision)
    config = config_from_amused(read_config(folder))
    return MaskGiTUViT.from_state(config, state_from_amused(read_weights(folder)), str(folder))


def save_amused_transformer(
    model: MaskGiTUViT, folder: Path, sample_size: int | None = None
) -> None:
    """Writes `model` as a diffusers UVit2DModel. Raises ValueError for a function it lacks."""
    config = config_to_amused(asdict(model.config), sample_size)
    write_diffusers_model(folder, config, state_to_amused(model.state_dict()))


def _check_norms(config: dict[str, Any]) -> None:
    """The norms of UVit2DModel's block attention are fixed, so the others must be like them."""
    eps, affine = config.get("layer_norm_eps", 1e-6), config.get("ln_elementwise_affine", True)
    if eps != 1e-6 or not affine:
        raise ValueError(
            f"layer_norm_eps={eps}, ln_elementwise_affine={affine}: the two models differ then, "
            "as the norms before UVit2DModel's block attention always have 1e-6 and weights"
        )
