"""The VQ models: step 3 (pixels -> codes) and its way back, for step 9 (codes -> pixels)."""

from collections.abc import Callable
from pathlib import Path

from storage.pretrained import read_config
from tokenize_stage.vq.amused_vq import load_amused_vq
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.model import VQModel
from tokenize_stage.vq.movq import MOVQ
from tokenize_stage.vq.paella_vq import PaellaVQModel
from tokenize_stage.vq.vqgan import VQGANModel

Loader = Callable[[str | Path, str | None, str | None], VQModel]

# The loader of each class, by the name in config.json.
VQ_MODELS: dict[str, Loader] = {
    "MaskGitVQGAN": MaskGitVQGAN.from_pretrained,
    "VQGANModel": VQGANModel.from_pretrained,
    "MOVQ": MOVQ.from_pretrained,
    "PaellaVQModel": PaellaVQModel.from_pretrained,
    "VQModel": load_amused_vq,  # diffusers'
}


def load_vq_model(
    name_or_path: str | Path, subfolder: str | None = None, revision: str | None = None
) -> VQModel:
    """Loads a VQ model from a model directory or the hub, in eval mode; its class is looked up.

    Raises ValueError for a model of a class that is no VQ model of ours.
    """
    class_name = read_config(name_or_path, subfolder, revision).get("_class_name")
    if class_name not in VQ_MODELS:
        legal = ", ".join(VQ_MODELS)
        raise ValueError(f"{name_or_path} holds a {class_name}; VQ models here: {legal}")
    return VQ_MODELS[class_name](name_or_path, subfolder, revision)
