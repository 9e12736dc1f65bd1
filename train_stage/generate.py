"""muse-generate: pictures from a trained model (steps 8 and 9), as PNGs and one grid.

    muse-generate model=runs/demo/train/model output_dir=runs/demo/generated class_ids=0,3 seed=7

Writes OUT/<class_id>/<index>.png, OUT/grid.png and OUT/generate.json (every setting used);
the pictures of an earlier run in OUT are replaced.
"""

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from omegaconf import MISSING
from torch import Tensor
from tqdm import tqdm

from configs.load import load_command_config
from storage.atomic import read_json, write_json
from storage.schema import Tokenizer
from train_stage import pictures
from train_stage.checkpoint import CODES
from train_stage.devices import pick_device
from train_stage.order import hash_words
from train_stage.sampling import generate
from train_stage.transformer import MaskGitTransformer

SETTINGS = "generate.json"


@dataclass
class GenerateConfig:
    model: str = MISSING
    """A model directory (RUN/model, RUN/checkpoint-1000/unwrapped_model) or hub name."""
    output_dir: str = MISSING
    """Where pictures go."""
    vq_model: str | None = None
    """The tokenizer that decodes; null takes the one the training store was made with."""
    class_ids: str = "all"
    """all, or numbers and ranges: 0,3,10-19."""
    images_per_class: int = 8
    """Pictures of each class."""
    guidance_scale: float = 3.0
    """Strength of classifier-free guidance; 0 for none."""
    temperature: float = 1.0
    """Scale of the noise in the order of unmasking: more varied above 1, less below."""
    timesteps: int = 18
    """Decoding steps."""
    mask_schedule: str = "cosine"
    """How many codes stay masked at each step."""
    temperature_decay: Literal["linear", "cumulative"] = "linear"
    """linear, or cumulative as in the reference's released code."""
    batch_size: int = 64
    """Pictures at once."""
    grid_columns: int = 8
    """Pictures in a row of the grid; every class gets one row."""
    seed: int = 0
    """Same seed and batch size, same pictures; classes do not depend on one another."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""


def main(argv: list[str] | None = None) -> int:
    """Generates, decodes and writes pictures; returns the exit status (2: refused)."""
    config = load_command_config(GenerateConfig, argv, __doc__ or "")
    try:
        run(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: GenerateConfig) -> None:
    """What main does, with errors as exceptions."""
    out, device = Path(config.output_dir), pick_device(config.device)
    check_replaceable(out)
    model = MaskGitTransformer.from_pretrained(config.model).to(device)
    vq, class_names = load_tokenizer(config, device)
    classes = parse_class_ids(config.class_ids, model.config.num_classes or 1)
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    write_json(out / SETTINGS, asdict(config))  # first: it marks the folder as ours to replace
    rows = []
    for class_id in tqdm(classes, desc="generate", unit="class", disable=None):
        codes = generate_class(model, class_id, config)
        images = pictures.decode_codes(vq, codes, config.batch_size)
        names = [f"{class_id}/{index:05d}.png" for index in range(len(images))]
        pictures.save_pictures(images, out, names)
        rows.append(images[: config.grid_columns])
    labels = [class_names[c] if class_names else str(c) for c in classes]
    pictures.save_grid(torch.cat(rows), out / "grid.png", len(rows[0]), labels)
    print(f"{len(classes) * config.images_per_class:,} pictures: {out}\ngrid: {out / 'grid.png'}")


def check_replaceable(out: Path) -> None:
    """Refuses a folder with anything but an earlier run's pictures: those are replaced."""
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise ValueError(f"output_dir={out} holds other files: choose a new or empty folder")


def load_tokenizer(
    config: GenerateConfig, device: torch.device
) -> tuple[pictures.VQModel, list[str]]:
    """The VQ model and class names; refuses a tokenizer that did not make the training codes."""
    record = Path(config.model) / CODES
    codes = read_json(record) if record.is_file() else None
    if codes is None and config.vq_model is None:
        raise ValueError(f"{config.model} does not say which tokenizer it needs: give vq_model=…")
    tokenizer = Tokenizer(**codes["tokenizer"]) if codes is not None else None
    vq = pictures.load_vq(config.vq_model or tokenizer.name, device)  # type: ignore[union-attr]
    if tokenizer is not None:
        pictures.check_tokenizer(vq, tokenizer)
    return vq, codes["class_names"] if codes is not None else []


def generate_class(model: MaskGitTransformer, class_id: int, config: GenerateConfig) -> Tensor:
    """Codes (images_per_class, N) of one class, in batches, from a seed of the class's own."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(int(hash_words(config.seed, class_id)) >> 1)
    left, parts = config.images_per_class, []
    while left:
        rows = min(left, config.batch_size)
        class_ids = torch.full((rows,), class_id, device=device)
        codes = generate(
            model,
            class_ids=class_ids if model.config.num_classes else None,
            rows=rows,
            temperature=config.temperature,
            timesteps=config.timesteps,
            guidance_scale=config.guidance_scale,
            noise_schedule=config.mask_schedule,
            temperature_decay=config.temperature_decay,
            generator=generator,
        )
        parts.append(codes)
        left -= rows
    return torch.cat(parts)


def parse_class_ids(text: str, classes: int) -> list[int]:
    """ "all" or "0,3,10-19" as numbers. Raises ValueError for anything else or out of range."""
    if text == "all":
        return list(range(classes))
    chosen: list[int] = []
    for word in text.split(","):
        first, _, last = word.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"class_ids={text}: write all, or numbers and ranges as in 0,3,10-19")
        chosen += range(int(first), int(last or first) + 1)
    beyond = [class_id for class_id in chosen if class_id >= classes]
    if beyond or not chosen:
        raise ValueError(f"class_ids={text}: the model has classes 0..{classes - 1}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
