"""The model directory: config.json + model.safetensors, on disk or on the Hugging Face hub.

Every model of the project is a PretrainedModel. The names of diffusers, sharded weights and the
published pytorch_model.bin are read too, the last as weights only (no code in the file is ever
run). Loading is strict. The only file of `storage` that imports torch.
"""

import dataclasses
import hashlib
import json
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from storage.atomic import atomic_directory, atomic_file
from storage.fingerprint import fingerprint

CONFIG_NAME = "config.json"
SAFE_NAME, LEGACY_NAME, INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"
WEIGHTS_NAMES = (  # the first that is there is read; INDEX: of weights in several files
    SAFE_NAME,
    SAFE_NAME + INDEX,
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors" + INDEX,
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    LEGACY_NAME,
)
FORMAT_VERSION = "0.0.1"  # what the published checkpoints carry as _version


class PretrainedModel(nn.Module):
    """A torch module whose constructor keywords are a dataclass, its config.json.

    A subclass sets `config_class` and builds its layers from `self.config` after
    `super().__init__(**fields)`. `class_name`: its name in config.json, where that is another.
    """

    config_class: ClassVar[type]
    class_name: ClassVar[str | None] = None

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
        cls,
        name_or_path: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Loads a model directory or a hub repository, in eval mode, on the CPU.

        Weights are cast to `dtype`, or to what the constructor makes (float32); those of that
        dtype stay mapped from the file: they are read when first used, and processes share them.
        Raises FileNotFoundError when there is no such model, ValueError when a key of the
        weights is missing, unknown or of another shape (all of them are listed).
        """
        folder = find_model(name_or_path, subfolder, revision)
        config = json.loads((folder / CONFIG_NAME).read_text())
        where = f"{folder} (a {config.get('_class_name')})"
        return cls.from_state(config, read_weights(folder), where, dtype)

    @classmethod
    def from_state(
        cls,
        config: dict[str, Any],
        state: dict[str, torch.Tensor],
        where: str,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A model in eval mode from the content of a config.json and all its weights.

        It takes the tensors themselves where they have its dtype. Raises ValueError, beginning
        with `where`, that lists every weight that is missing, unknown or of another shape.
        """
        model = cls._without_weights(config)
        check_fits(model, state, where)
        cast = {}
        for name, own in model.state_dict().items():
            wanted = dtype if dtype and own.is_floating_point() else own.dtype
            cast[name] = state[name].to(wanted)
        model.load_state_dict(cast, assign=True)
        return model.to(dtype).eval()

    @classmethod
    def _without_weights(cls, config: dict[str, Any]) -> Self:
        """A model whose parameters have no memory yet: those of a file will take their places."""
        with torch.device("meta"), NoRandomValues():
            model = cls.from_config(config)
        saved = model.state_dict()
        if all(name in saved for name, _ in model.named_buffers()):
            return model
        return cls.from_config(config)  # some buffers are in no file, only the constructor's

    def save_pretrained(self, path: str | Path, safe_serialization: bool = True) -> None:
        """Writes config.json and model.safetensors into `path`, replacing what is there.

        safe_serialization=False writes pytorch_model.bin instead, as open-muse did and reads.
        """
        path = Path(path)
        if not path.exists():
            with atomic_directory(path) as folder:
                self._write(folder, safe_serialization)
            return
        self._write(path, safe_serialization)

    def push_to_hub(
        self, repo_id: str, private: bool = False, safe_serialization: bool = True
    ) -> str:
        """Uploads the model directory to the hub; returns its address. Needs a hub login."""
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), safe_serialization)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(url)

    def config_dict(self) -> dict[str, Any]:
        """The content of config.json: constructor keywords, sorted, plus the class name."""
        class_name = self.class_name or type(self).__name__
        config = {"_class_name": class_name, "_version": FORMAT_VERSION}
        return dict(sorted((config | dataclasses.asdict(self.config)).items()))

    def _write(self, folder: Path, safe_serialization: bool) -> None:
        state = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        written = SAFE_NAME if safe_serialization else LEGACY_NAME
        with atomic_file(folder / written) as temporary:
            if safe_serialization:
                save_file(state, temporary, metadata={"format": "pt"})
            else:
                torch.save(state, temporary)
        for name in WEIGHTS_NAMES:
            if name != written:  # older weights that would be read in place of these
                (folder / name).unlink(missing_ok=True)
        with atomic_file(folder / CONFIG_NAME) as temporary:
            temporary.write_text(json.dumps(self.config_dict(), indent=2) + "\n")


class NoRandomValues(TorchFunctionMode):
    """Draws nothing for tensors without memory: torch imports its compiler to do so (a second)."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):  # torch's or nn.init's
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **kwargs)


def find_model(
    name_or_path: str | Path, subfolder: str | None = None, revision: str | None = None
) -> Path:
    """The local folder of a model: the path itself, or the hub repository in the hub's cache."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            folder = _download(str(name_or_path), f"{subfolder}/" if subfolder else "", revision)
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


def _download(repo_id: str, prefix: str, revision: str | None) -> Path:
    """The hub's snapshot of a repository with config.json and the first weights that it has."""
    folder = Path()
    for name in WEIGHTS_NAMES:
        parts = (
            [name.removesuffix(f".safetensors{INDEX}") + "-*.safetensors"]
            if name.endswith(INDEX)
            else []
        )
        patterns = [prefix + wanted for wanted in (CONFIG_NAME, name, *parts)]
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
        if (folder / prefix / name).is_file():
            break
    return folder


def read_config(
    name_or_path: str | Path, subfolder: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """The config.json of a model directory or hub repository, as it stands."""
    return json.loads((find_model(name_or_path, subfolder, revision) / CONFIG_NAME).read_text())


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict in a model directory, mapped from the first of WEIGHTS_NAMES it has.

    Raises FileNotFoundError without weights, ValueError for a file that is damaged or holds more
    than weights.
    """
    path = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no weights; looked for {', '.join(WEIGHTS_NAMES)}")
    if path.name == LEGACY_NAME:
        return _read_legacy(path)
    files = [path]
    if path.name.endswith(INDEX):
        names = json.loads(path.read_text())["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None


def _read_legacy(path: Path) -> dict[str, torch.Tensor]:
    try:
        mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 are none
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(f"{path} is damaged or holds no weights: fetch it again") from None
        raise ValueError(
            f"{path} holds code ({code[1]}) beside the weights. Nothing of it was run; "
            f"get the weights as {SAFE_NAME}"
        ) from None
    flat = isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values())
    if not flat:
        held = list(state)[:5] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} is no flat dictionary of tensors; it holds {held}")
    return state


def load_strictly(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Copies `state` into `model`. Raises ValueError listing every key that does not fit."""
    check_fits(model, state, where)
    model.load_state_dict(state)


def check_fits(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Raises ValueError listing every key that is missing, unknown or of another shape."""
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


def model_fingerprint(model: PretrainedModel) -> str:
    """sha256 (hex) over class name, config and every weight: which tokenizer made the codes."""
    return weights_fingerprint(model, fingerprint(model.config_dict()))


def weights_fingerprint(model: nn.Module, about: str = "") -> str:
    """sha256 (hex) over the text `about` and every weight: name, dtype, shape, bytes."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
