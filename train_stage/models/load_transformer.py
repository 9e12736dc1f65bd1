"""Opens a transformer of any kind by the class its config.json names (step 7, before 8).

Ours, those that open-muse published, and aMUSEd's in diffusers' layout, converted as it is read.
"""

from collections.abc import Callable
from pathlib import Path

from storage.pretrained import read_config
from train_stage.models.amused import load_amused_transformer
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT

Transformer = MaskGitTransformer | MaskGiTUViT
Loader = Callable[[str | Path, str | None, str | None], Transformer]
LOADERS: dict[str, Loader] = {
    "MaskGitTransformer": MaskGitTransformer.from_pretrained,
    "MaskGiTUViT": MaskGiTUViT.from_pretrained,
    "MaskGiTUViT_v2": MaskGiTUViT.from_pretrained,
    "UVit2DModel": load_amused_transformer,
}
# What the second U-ViT computes, where the first, which open-muse saved under the same name, could
# be set to compute something else.
SECOND_UVIT = {
    "use_position_embeddings": False,
    "patch_size": 1,
    "num_classes": None,
    "ffn_type": "glu",
    "res_ffn_factor": 4,
    "use_normformer": False,
    "use_vannilla_resblock": False,
    "learn_uncond_embeds": False,
    "add_cond_embeds": True,
    "add_micro_cond_embeds": True,
}


def load_transformer(
    name_or_path: str | Path, subfolder: str | None = None, revision: str | None = None
) -> Transformer:
    """A transformer from a model directory or the hub, in eval mode, on the CPU.

    Raises ValueError for another class of model, for a first-version U-ViT, and for weights that do
    not fit; FileNotFoundError when there is no such model.
    """
    config = read_config(name_or_path, subfolder, revision)
    class_name = config.get("_class_name")
    if class_name not in LOADERS:
        legal = ", ".join(LOADERS)
        raise ValueError(f"{name_or_path} holds a {class_name}; transformers here: {legal}")
    if class_name == "MaskGiTUViT":
        _refuse_first_uvit(config, str(name_or_path))
    return LOADERS[class_name](name_or_path, subfolder, revision)


def _refuse_first_uvit(config: dict, where: str) -> None:
    levels = config.get("block_out_channels", [768])
    odd = {key: config[key] for key, want in SECOND_UVIT.items() if config.get(key, want) != want}
    if len(levels) != 1:
        odd["block_out_channels"] = levels
    if odd:
        raise ValueError(
            f"{where} is a U-ViT of open-muse's first version, another model than the published "
            f"muse-256 and muse-512, which no code of this project computes: it has {odd}"
        )
