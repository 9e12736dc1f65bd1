"""The model directory: config.json + model.safetensors, on disk or on the Hugging Face hub.

Every model of the project is a PretrainedModel; a published pytorch_model.bin is read too, as
weights only (no code in the file is ever run). Loading is strict. The only file of `storage`
that imports torch.
"""

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from storage.atomic import atomic_directory, atomic_file
from storage.fingerprint import fingerprint

CONFIG_NAME = "config.json"
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
FORMAT_VERSION = "0.0.1"  # what the published checkpoints carry as _version


class PretrainedModel(nn.Module):
    """A torch module whose constructor keywords are a dataclass, its config.json.

    A subclass sets `config_class` and builds its layers from `self.config` after
    `super().__init__(**fields)`.
    """

    config_class: ClassVar[type]

    def __init__(self, **fields: Any):
        super().__init__()
        legal = [field.name for field in dataclasses.fields(self.config_class)]
        unknown = sorted(set(fields) - set(legal))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {unknown}; legal: {', '.join(legal)}")
        self.config: Any = self.config_class(**fields)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Builds an untrained model from the content of a config.json.

        Keys the model does not know (an EMA's state, keys of older versions) are dropped: the
        published files carry many. The constructor itself refuses unknown keywords.
        """
        fields = {field.name: field for field in dataclasses.fields(cls.config_class)}
        known = {key: value for key, value in config.items() if key in fields}
        for key, value in known.items():
            if isinstance(value, list) and isinstance(fields[key].default, tuple):
                known[key] = tuple(value)
        return cls(**known)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, subfolder: str | None = None, revision: str | None = None
    ) -> Self:
        """Loads a model directory or a hub repository, in eval mode, on the CPU.

        Raises FileNotFoundError when there is no such model, ValueError when a key of the
        weights is missing, unknown or of another shape (all of them are listed).
        """
        folder = find_model(name_or_path, subfolder, revision)
        model = cls.from_config(json.loads((folder / CONFIG_NAME).read_text()))
        load_strictly(model, read_weights(folder), str(folder))
        return model.eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json and model.safetensors into `path`, replacing what is there."""
        path = Path(path)
        if not path.exists():
            with atomic_directory(path) as folder:
                self._write(folder)
            return
        self._write(path)

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Uploads the model directory to the hub; returns its address. Needs a hub login."""
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder))
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(url)

    def config_dict(self) -> dict[str, Any]:
        """The content of config.json: constructor keywords, sorted, plus the class name."""
        config = {"_class_name": type(self).__name__, "_version": FORMAT_VERSION}
        return dict(sorted((config | dataclasses.asdict(self.config)).items()))

    def _write(self, folder: Path) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_file(folder / WEIGHTS_NAMES[0]) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        with atomic_file(folder / CONFIG_NAME) as temporary:
            temporary.write_text(json.dumps(self.config_dict(), indent=2) + "\n")


def find_model(
    name_or_path: str | Path, subfolder: str | None = None, revision: str | None = None
) -> Path:
    """The local folder of a model: the path itself, or the hub repository in the hub's cache."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        wanted = [CONFIG_NAME, *WEIGHTS_NAMES]
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in wanted]
        try:
            folder = Path(
                snapshot_download(str(name_or_path), revision=revision, allow_patterns=patterns)
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"{name_or_path} is neither a folder nor a hub repository that can be reached "
                f"({type(error).__name__}); give the path of a folder with {CONFIG_NAME}"
            ) from None
    folder = folder / subfolder if subfolder else folder
    if not (folder / CONFIG_NAME).is_file():
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}; it holds: {found}")
    return folder


def read_config(
    name_or_path: str | Path, subfolder: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """The config.json of a model directory or hub repository, as it stands."""
    return json.loads((find_model(name_or_path, subfolder, revision) / CONFIG_NAME).read_text())


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict in a model directory, from safetensors or the older pytorch_model.bin."""
    safe, legacy = (folder / name for name in WEIGHTS_NAMES)
    if safe.is_file():
        return load_file(safe)
    if legacy.is_file():
        return torch.load(legacy, map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"{folder} has no weights; looked for {', '.join(WEIGHTS_NAMES)}")


def load_strictly(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Loads `state` into `model`. Raises ValueError listing every key that does not fit."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unknown {name}" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the model {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{where} does not fit {type(model).__name__}:\n  {listed}")
    model.load_state_dict(state)


def model_fingerprint(model: PretrainedModel) -> str:
    """sha256 (hex) over class name, config and every weight: which tokenizer made the codes."""
    digest = hashlib.sha256(fingerprint(model.config_dict()).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
