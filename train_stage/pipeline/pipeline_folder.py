"""The folder of a whole pipeline, for pipeline.py (steps 8 and 9): finding, opening, writing it.

    vae/             the VQ model             (diffusers: vqvae/)
    transformer/     the transformer
    text_encoder/    encoder and tokenizer, if the transformer reads text (diffusers: tokenizer/)
    pipeline.json    PipelineSettings; folders of open-muse and diffusers lack it

The parts are open-muse's: each opens what the other writes. aMUSEd's folders (diffusers) are opened
as they are, their models converted on the way. So are a training run's model directories, whose
codes.json names their tokenizer.
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from storage.atomic import atomic_directory, atomic_file, read_json
from storage.pretrained import CONFIG_NAME, find_model
from storage.schema import Tokenizer
from tokenize_stage.text.text_encoder import TextEncoder
from train_stage import pictures
from train_stage.conditioning.prompt_encoder import PromptEncoder
from train_stage.models.load_transformer import Transformer, load_transformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.training.checkpoint import CODES

SETTINGS = "pipeline.json"
SMALL_FILES = ("*.json", "*.txt", "*.model")  # configs and tokenizers, all of a layout but weights


@dataclass
class PipelineSettings:
    """What no part's own config says: the content of pipeline.json."""

    grid: tuple[int, int] | None = None
    """(h, w) codes of a picture when no size is asked for; None: as the transformer was trained."""
    noise_schedule: str = "cosine"
    """How many codes stay hidden at each step."""
    class_names: list[str] = field(default_factory=list)
    """A name for each class id, where they are known."""
    class_prompt: str | None = None
    """What makes a prompt of a class's name, for models trained on those."""
    aesthetic_score: float = 6.0
    """What a U-ViT is told of a picture when no score is asked for."""


class Parts(NamedTuple):
    """What a pipeline is made of."""

    vae: pictures.VQModel
    transformer: Transformer
    text_encoder: TextEncoder | PromptEncoder | None
    settings: PipelineSettings


def open_parts(
    name_or_path: str | Path,
    vq_model: str | Path | None = None,
    text_encoder: str | Path | None = None,
    revision: str | None = None,
) -> Parts:
    """Loads a pipeline's folder or hub repository, or a model directory, onto the CPU.

    vq_model, text_encoder: taken instead of the pipeline's own. Raises FileNotFoundError when
    nothing is there, ValueError for parts that do not belong together.
    """
    folder = find_folder(name_or_path, revision)
    if not (folder / "transformer" / CONFIG_NAME).is_file():
        return open_model(name_or_path, folder, vq_model, text_encoder, revision)
    transformer = load_transformer(find_model(name_or_path, "transformer", revision))
    if vq_model is None:
        inside = next((part for part in ("vae", "vqvae") if (folder / part).is_dir()), None)
        if inside is None:
            raise FileNotFoundError(f"{folder} has neither vae/ nor vqvae/: give vq_model=…")
        vq_model = find_model(name_or_path, inside, revision)
    encoder = None
    if text_encoder is not None:
        encoder = TextEncoder.from_pretrained(text_encoder)
    elif (folder / "text_encoder").is_dir():
        whole = find_model(name_or_path, "text_encoder", revision).parent
        place = "tokenizer" if (folder / "tokenizer").is_dir() else None
        encoder = TextEncoder.from_pretrained(whole, "text_encoder", place)
    vae = pictures.load_vq(vq_model, "cpu")
    return Parts(vae, transformer, encoder, read_settings(folder, transformer))


def open_model(
    name_or_path: str | Path,
    folder: Path,
    vq_model: str | Path | None,
    text_encoder: str | Path | None,
    revision: str | None,
) -> Parts:
    """The parts for a transformer's model directory; refuses a VQ model it was not made for."""
    if not (folder / CONFIG_NAME).is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir()))
        raise FileNotFoundError(
            f"{folder} is no pipeline (transformer/, vae/) and no model directory ({CONFIG_NAME}); "
            f"it holds: {found}"
        )
    codes = read_json(folder / CODES) if (folder / CODES).is_file() else None
    tokenizer = Tokenizer(**codes["tokenizer"]) if codes else None
    if vq_model is None and tokenizer is None:
        raise ValueError(f"{name_or_path} does not say which tokenizer it needs: give vq_model=…")
    transformer = load_transformer(name_or_path, None, revision)
    vae = pictures.load_vq(vq_model or tokenizer.name, "cpu")  # type: ignore[union-attr]
    if tokenizer is not None:
        pictures.check_tokenizer(vae, tokenizer)
    condition = (codes or {}).get("condition")
    settings = PipelineSettings(
        tuple(tokenizer.grid) if tokenizer is not None else None,  # type: ignore[arg-type]
        class_names=codes["class_names"] if codes else [],
    )
    if condition:
        settings.class_prompt = condition["class_prompt"]
        settings.aesthetic_score = condition["aesthetic_score"]
        encoders = open_encoders(condition, transformer, text_encoder)
        return Parts(vae, transformer, encoders, settings)
    encoder = TextEncoder.from_pretrained(text_encoder) if text_encoder is not None else None
    return Parts(vae, transformer, encoder, settings)


def open_encoders(
    condition: dict[str, Any], transformer: Transformer, override: str | Path | None
) -> PromptEncoder:
    """The text encoders that codes.json names. Raises ValueError where one stands for several."""
    records = condition["text_encoders"]
    if override is not None and len(records) > 1:
        raise ValueError(
            f"text_encoder={override}: the model reads {len(records)}, {', '.join(records)}; edit "
            f"their places in {CODES}"
        )
    if override is not None:
        records = {name: record | {"pretrained": str(override)} for name, record in records.items()}
    return PromptEncoder.from_records(records, isinstance(transformer, MaskGiTUViT))


def find_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or the hub's cache of a repository: all of it but the weights."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        found = snapshot_download(
            str(name_or_path), revision=revision, allow_patterns=list(SMALL_FILES)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name_or_path} is neither a folder nor a hub repository that can be reached "
            f"({type(error).__name__}); give the path of a pipeline or of a model directory"
        ) from None
    return Path(found)


def read_settings(folder: Path, transformer: Transformer) -> PipelineSettings:
    """pipeline.json, or the same from a diffusers pipeline's transformer/ and scheduler/."""
    path = folder / SETTINGS
    if path.is_file():
        known = {entry.name for entry in fields(PipelineSettings)}
        values = {key: x for key, x in json.loads(path.read_text()).items() if key in known}
        if values.get("grid"):
            values["grid"] = tuple(values["grid"])
        return PipelineSettings(**values)
    settings = PipelineSettings()
    side = json.loads((folder / "transformer" / CONFIG_NAME).read_text()).get("sample_size")
    if side is not None:
        settings.grid = (side, side)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        values = json.loads(scheduler.read_text())
        settings.noise_schedule = values.get("masking_schedule", settings.noise_schedule)
        if values["mask_token_id"] != transformer.mask_token_id:
            raise ValueError(
                f"{scheduler} has mask_token_id={values['mask_token_id']}, the transformer's is "
                f"{transformer.mask_token_id}: one of them is of another model"
            )
    return settings


def default_grid(transformer: Transformer) -> tuple[int, int]:
    """(h, w) codes of the pictures that a transformer was trained on, as far as its config says.

    For MaskGiTUViT, which does not: 16 x 16, or 32 x 32 where it halves its grid, as published.
    """
    if isinstance(transformer, MaskGiTUViT):
        return (32, 32) if transformer.config.force_down_up_sample else (16, 16)
    count = transformer.config.num_vq_tokens
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} codes an image are no square: say which grid, as in grid=(h, w)")
    return side, side


def save_parts(parts: Parts, folder: Path, safe_serialization: bool = True) -> None:
    """Writes a pipeline's folder, replacing one that is there. See MusePipeline.save_pretrained."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} holds other files: choose a new or empty folder")
    if folder.is_dir():
        write_parts(parts, folder, safe_serialization)
        return
    with atomic_directory(folder) as temporary:
        write_parts(parts, temporary, safe_serialization)


def write_parts(parts: Parts, folder: Path, safe_serialization: bool) -> None:
    parts.vae.save_pretrained(folder / "vae", safe_serialization)
    parts.transformer.save_pretrained(folder / "transformer", safe_serialization)
    if parts.text_encoder is not None:
        parts.text_encoder.save_pretrained(folder / "text_encoder")
    elif (folder / "text_encoder").is_dir():  # of the pipeline that was here
        shutil.rmtree(folder / "text_encoder")
    with atomic_file(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps(asdict(parts.settings), indent=2) + "\n")
