"""muse-generate: pictures from a trained model (steps 8 and 9), as PNGs and one grid.

    muse-generate model=runs/demo/train/model output_dir=runs/demo/generated class_ids=0,3 seed=7
    muse-generate model=amused/amused-256 output_dir=pictures prompts="[a dog, a cat on the moon]"
    muse-generate model=amused/amused-256 output_dir=pictures prompts="[a hat]" \\
        image=me.jpg mask=head.png

Writes OUT/<class id or number of the prompt>/<index>.png, OUT/grid.png and OUT/generate.json (every
setting used); the pictures of an earlier run in OUT are replaced.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import MISSING
from tqdm import tqdm

from configs.load import load_command_config
from storage.atomic import write_json
from train_stage import pictures
from train_stage.loading.order import hash_words
from train_stage.pipeline.muse_pipeline import MusePipeline
from train_stage.pipeline.pipeline_inputs import Canvas

SETTINGS = "generate.json"


class Group(NamedTuple):
    """Pictures that are drawn together, from one seed."""

    numbers: list[int]  # of the classes or prompts: their folders
    labels: list[str]
    condition: dict[str, Any]  # for the pipeline


@dataclass
class GenerateConfig:
    model: str = MISSING
    """A pipeline (see train_stage/pipeline/pipeline_folder.py) or a model directory (RUN/model,
    RUN/checkpoint-1000/unwrapped_model): a folder or a hub name."""
    output_dir: str = MISSING
    """Where pictures go."""
    vq_model: str | None = None
    """The tokenizer that decodes; null takes the pipeline's, or the one the training store was made
    with."""
    text_encoder: str | None = None
    """The encoder of prompts; null takes the pipeline's."""
    class_ids: str = "all"
    """all, or numbers and ranges: 0,3,10-19."""
    prompts: list[str] = field(default_factory=list)
    """What to draw, for models that read text."""
    prompts_file: str | None = None
    """A text file with a prompt in every line, after those of prompts."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    images_per_class: int = 8
    """Pictures of each class or prompt."""
    height: int | None = None
    """Pixels, for models that can make several sizes; null is the size it was trained on."""
    width: int | None = None
    """Pixels."""
    image: str | None = None
    """A picture to draw on: in its mask, or after it."""
    mask: str | None = None
    """A picture of the image's shape, white where to draw; the rest of the image is kept."""
    strength: float | None = None
    """Share of the decoding steps to do on an image: the more, the less of it is left. null: 0.5,
    with a mask 1."""
    guidance_scale: float | None = None
    """Strength of classifier-free guidance, 0 for none; null: 3 for classes, 10 for text."""
    temperature: float | None = None
    """Scale of the noise in the order of unmasking: more varied above 1, less below. null: 1 for
    classes, from 2 to 0 for text."""
    timesteps: int | None = None
    """Decoding steps; null: 18 for classes, 12 for text."""
    mask_schedule: str | None = None
    """How many codes stay masked at each step; null: cosine, with a mask linear."""
    temperature_decay: Literal["linear", "cumulative", "linspace"] | None = None
    """linear, cumulative as in the reference's released code, or linspace as in its U-ViT; null:
    linear for classes, linspace for text."""
    critic: Literal["self"] | None = None
    """self: the model's critic says which codes are hidden again, not their probability; for models
    trained with training.critic=self."""
    batch_size: int = 64
    """Pictures at once."""
    grid_columns: int = 8
    """Pictures in a row of the grid; every class or prompt gets one row."""
    seed: int = 0
    """Same seed and batch size, same pictures; classes do not depend on one another."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What transformer and text encoder compute in."""
    compile: bool = False
    """Compile the transformer: slow to start, then faster."""


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
    out = Path(config.output_dir)
    check_replaceable(out)
    pipe = MusePipeline.from_pretrained(
        config.model,
        config.vq_model,
        config.text_encoder,
        dtype=getattr(torch, config.dtype),
        device=config.device,
    )
    if config.compile:
        pipe.compile()
    groups, canvas = plan(config, pipe), open_canvas(config)
    rows: list[torch.Tensor] = []
    pipe.progress = False
    with tqdm(
        total=sum(len(group.numbers) for group in groups) * config.images_per_class,
        desc="generate",
        unit=" pictures",
        disable=None,
    ) as bar:
        for group in groups:
            drawn = draw(pipe, group, canvas, config)
            if not rows:  # only now, as nothing was refused
                start_folder(out, settings_used(config, pipe))
            for number, images in zip(group.numbers, drawn, strict=True):
                names = [f"{number}/{index:05d}.png" for index in range(len(images))]
                pictures.save_pictures(images, out, names)
                rows.append(images[: config.grid_columns])
                bar.update(len(images))
    labels = [label for group in groups for label in group.labels]
    pictures.save_grid(torch.cat(rows), out / "grid.png", len(rows[0]), labels)
    print(f"{len(rows) * config.images_per_class:,} pictures: {out}\ngrid: {out / 'grid.png'}")


def check_replaceable(out: Path) -> None:
    """Refuses a folder with anything but an earlier run's pictures: those are replaced."""
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise ValueError(f"output_dir={out} holds other files: choose a new or empty folder")


def start_folder(out: Path, settings: dict[str, Any]) -> None:
    """An empty folder, but for the settings: they mark it as ours to replace."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    write_json(out / SETTINGS, settings)


def plan(config: GenerateConfig, pipe: MusePipeline) -> list[Group]:
    """What is drawn together: a class, or as many prompts as fit a batch."""
    prompts = read_prompts(config)
    if prompts:
        step = max(1, config.batch_size // config.images_per_class)
        numbers = list(range(len(prompts)))
        groups = [(numbers[i : i + step], prompts[i : i + step]) for i in numbers[::step]]
        return [Group(some, words, {"prompt": words}) for some, words in groups]
    if pipe.class_prompt is not None:  # the names of classes are the prompts
        prompts = [pipe.class_prompt.format(name) for name in pipe.class_names]
        chosen = parse_class_ids(config.class_ids, len(prompts))
        return [Group([c], [pipe.class_names[c]], {"prompt": prompts[c]}) for c in chosen]
    if pipe.reads_text:
        raise ValueError("this model reads text: give prompts=[…], or prompts_file=…")
    classes, names = pipe.transformer.config.num_classes, pipe.class_names
    return [
        Group([c], [names[c] if names else str(c)], {"class_ids": c} if classes else {})
        for c in parse_class_ids(config.class_ids, classes or 1)
    ]


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of the command line, then those of the file."""
    lines: list[str] = []
    if config.prompts_file is not None:
        lines = Path(config.prompts_file).read_text().splitlines()
    return config.prompts + [line.strip() for line in lines if line.strip()]


def open_canvas(config: GenerateConfig) -> Canvas | None:
    """The picture to draw on, where there is one."""
    if config.image is not None:
        mask = pictures.open_picture(config.mask) if config.mask is not None else None
        return Canvas(pictures.open_picture(config.image), mask, config.strength)
    if config.mask is not None or config.strength is not None:
        raise ValueError("mask and strength are for drawing on a picture: give image=…, too")
    return None


def draw(
    pipe: MusePipeline, group: Group, canvas: Canvas | None, config: GenerateConfig
) -> Sequence[torch.Tensor]:
    """images_per_class pictures for each of the group, from a seed of the group's own."""
    seed = int(hash_words(config.seed, group.numbers[0])) >> 1
    images: torch.Tensor = pipe(
        **group.condition,
        negative_prompt=config.negative_prompt,
        guidance_scale=config.guidance_scale,
        num_inference_steps=config.timesteps,
        temperature=config.temperature,
        num_images_per_prompt=config.images_per_class,
        height=config.height,
        width=config.width,
        generator=torch.Generator(pipe.device).manual_seed(seed),
        noise_schedule=config.mask_schedule,
        temperature_decay=config.temperature_decay,
        critic=config.critic,
        canvas=canvas,
        batch_size=config.batch_size,
        output_type="uint8",
    )
    return images.split(config.images_per_class)


def settings_used(config: GenerateConfig, pipe: MusePipeline) -> dict[str, Any]:
    """The content of generate.json: the configuration, with what it leaves to the pipeline."""
    steps, scale, temperature = pipe.defaults
    own = {"timesteps": steps, "guidance_scale": scale, "temperature": temperature}
    given = {key: value for key, value in asdict(config).items() if value is not None}
    return asdict(config) | own | given | {"prompts": read_prompts(config)}


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
