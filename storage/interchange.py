"""What converters of model directories share: names by a table, diffusers' files.

A table is a list of pairs (a module's name here, its name there), `{}` standing for a number;
read backwards, it converts backwards.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from storage.atomic import atomic_file
from storage.pretrained import CONFIG_NAME

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
Pairs = Iterable[tuple[str, str]]


def backwards(pairs: Pairs) -> list[tuple[str, str]]:
    """The same table, read from the other side."""
    return [(there, here) for here, there in pairs]


def rename(names: Iterable[str], pairs: Pairs) -> dict[str, str]:
    """Every name with its new one: the first pair that names its module, or all of it, decides.

    Raises ValueError listing the names that no pair knows.
    """
    forms = []
    for here, there in pairs:
        numbered = re.escape(here).replace(r"\{\}", r"(\d+)")
        forms.append((re.compile(rf"{numbered}(\..+)?"), there + "{}"))

    def new_name(name: str) -> str | None:
        for form, there in forms:
            if match := form.fullmatch(name):
                return there.format(*(group or "" for group in match.groups()))
        return None

    renamed = {name: new_name(name) for name in names}
    unknown = [name for name, new in renamed.items() if new is None]
    if unknown:
        raise ValueError("weights of no known name:\n  " + "\n  ".join(unknown))
    return {name: new for name, new in renamed.items() if new is not None}


def write_diffusers_model(folder: Path, config: Mapping[str, Any], state: dict[str, Any]) -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    with atomic_file(folder / DIFFUSERS_WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    with atomic_file(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
