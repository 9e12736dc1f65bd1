"""The VQ models: step 3 (pixels -> codes) and its way back, for step 9 (codes -> pixels)."""

from pathlib import Path

from storage.pretrained import read_config
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.model import VQModel

VQ_MODELS: dict[str, type[VQModel]] = {"MaskGitVQGAN": MaskGitVQGAN}


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
    return VQ_MODELS[class_name].from_pretrained(name_or_path, subfolder, revision)
