"""What an audit looks at: rows of a store, their tokenizers, and the images they were made from."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from configs.load import load_config
from storage.pretrained import model_fingerprint
from storage.progress import progress_bar
from storage.reader import TokenStore
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.pixels.decode import Picture
from tokenize_stage.process import pick_device
from tokenize_stage.quality.config import AuditConfig
from tokenize_stage.quality.drawn_rows import DrawnRow, draw_rows, find_images
from tokenize_stage.quality.examine import reconstruct
from tokenize_stage.quality.ways import make_pictures
from tokenize_stage.sources.config import DatasetConfig
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.sources.read import read_patience
from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq.model import VQModel
from tokenize_stage.work.plan import WORK, read_plan


@dataclass
class Subject:
    """Drawn rows, and of every column of codes its tokenizer in float32 on `device`."""

    config: AuditConfig
    store: TokenStore
    rows: list[DrawnRow]
    device: torch.device
    models: dict[str, VQModel]
    places: dict[str, str]  # where the tokenizers lie
    resolutions: dict[str, int]

    def codes(self, column: str) -> np.ndarray:
        """Stored codes of the rows, (n, N)."""
        return self.store.read_codes([row.number for row in self.rows], column)

    def rebuilt(self, column: str, codes: np.ndarray) -> np.ndarray:
        """Codes (n, N) -> pictures (n, 3, R, R) uint8."""
        grid = self.store.meta.tokenizers[column].grid
        return reconstruct(self.models[column], codes, grid, self.config.batch_size)

    def sizes(self) -> list[int]:
        """The resolutions, each once, as Decoder and Encoder have them in order."""
        return list(dict.fromkeys(self.resolutions.values()))


def open_subject(config: AuditConfig) -> Subject:
    """Draws rows, loads tokenizers. Raises ValueError or FileNotFoundError, saying what helps."""
    store = TokenStore(config.store)
    device = pick_device("device", config.device, os.environ)
    recorded = store.meta.tokenizers
    unknown = sorted(set(config.tokenizers) - set(recorded))
    if unknown or not recorded:
        legal = ", ".join(recorded) or "none, so there is nothing to audit"
        raise ValueError(f"tokenizers={unknown}: the columns of codes of {store.path} are {legal}")
    rows = draw_rows(store, config.rows, config.shards, config.seed)
    places = {name: config.tokenizers.get(name, one.name) for name, one in recorded.items()}
    models = {name: open_tokenizer(store, name, place) for name, place in places.items()}
    resolutions = {name: store.meta.resolution for name in recorded}
    resolutions |= store.meta.transform.get("resolutions", {})
    on_device = {name: model.to(device) for name, model in models.items()}
    return Subject(config, store, rows, device, on_device, places, resolutions)


def open_tokenizer(store: TokenStore, column: str, place: str) -> VQModel:
    """The tokenizer that made a column. Raises ValueError or FileNotFoundError for another one."""
    hint = f"give tokenizers.{column}=FOLDER, where it is now"
    try:
        model = load_vq_model(place)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the tokenizer of {column}: {error}; {hint}") from None
    recorded = store.meta.tokenizers[column]
    if model_fingerprint(model) != recorded.fingerprint:
        raise ValueError(
            f"{place} has other weights than the {recorded.class_name} that made {column} of "
            f"{store.path}: {hint}"
        )
    return model


def encoding_dataset(config: AuditConfig) -> DatasetConfig | None:
    """dataset.* of the run that made the store, with the images' new place; None: not recorded."""
    path = Path(config.store) / WORK / "config.yaml"
    if not path.is_file():
        return None
    dataset = load_config(TokenizeConfig, [f"config={path}"]).dataset
    return replace(dataset, shards_path_or_url=config.sources or dataset.shards_path_or_url)


def find_pictures(
    subject: Subject, dataset: DatasetConfig
) -> tuple[dict[int, bytes], dict[int, Picture], list[str]]:
    """Row number -> image, row number -> the crop that was encoded, why others have none.

    Raises ValueError when the crops would be made otherwise than store.json says.
    """
    planned = None if subject.config.sources else read_plan(Path(subject.config.store))
    try:  # a plan may be of some shards only, and what was configured last may be, too
        shards = [*(planned or ()), *list_input_shards(dataset)]
    except (OSError, ValueError) as error:
        return {}, {}, [str(error)]
    bar = progress_bar("images", "shard")
    images, problems = find_images(subject.rows, shards, read_patience(dataset), bar)
    pictures, bad, transform = make_pictures(
        subject.rows, images, dataset.preprocessing, subject.sizes()
    )
    recorded = subject.store.meta.transform
    for key, value in transform.items():
        if recorded.get(key) != value:
            raise ValueError(
                f"{subject.store.path} was made with {key} {recorded.get(key)!r}, its "
                f"{WORK}/config.yaml gives {value!r}: restore that file, or remove it for an audit "
                "without images"
            )
    return images, pictures, problems + bad
