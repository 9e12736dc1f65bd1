"""muse-convert: a model, or a whole text-to-image pipeline, from one layout to another.

    muse-convert input=amused/amused-256 output=models/amused-256
    muse-convert input=models/amused-256 output=exports/amused-256
    muse-convert input=vqgan_imagenet_f16_16384/last.ckpt output=models/vqgan-f16

What input holds decides what is made of it:
    diffusers' aMUSEd pipeline (folder, hub name)   our pipeline: vae, transformer, text_encoder, …
    our pipeline (vae/, transformer/, …)            one that diffusers.AmusedPipeline opens
    diffusers' UVit2DModel or VQModel               our MaskGiTUViT or VQGANModel
    our MaskGiTUViT or VQGANModel                   diffusers' UVit2DModel or VQModel
    a taming-transformers checkpoint (.ckpt)        our VQGANModel
    MaskGIT's tokenizer checkpoint (JAX)            our MaskGitVQGAN
The new model computes the same function. Weights are checked name by name and written as float32;
what has no place in the new layout is listed. No code in a checkpoint is ever run.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from configs.load import load_command_config
from storage.atomic import atomic_directory
from storage.pretrained import CONFIG_NAME, PretrainedModel, find_model, read_config
from train_stage import pictures
from train_stage.models.amused import load_amused_transformer, save_amused_transformer
from train_stage.models.load_transformer import load_transformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.pipeline.pipeline_folder import SETTINGS, default_grid, find_folder, read_settings

INDEX = "model_index.json"  # of a diffusers pipeline
TEXT_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors")
THEIR_CLASSES = {  # part of an aMUSEd pipeline: its library and class
    "scheduler": ["diffusers", "AmusedScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "UVit2DModel"],
    "vqvae": ["diffusers", "VQModel"],
}


@dataclass
class ConvertConfig:
    input: str = MISSING
    """A folder, a checkpoint file, or the name of a repository on the Hugging Face hub."""
    output: str = MISSING
    """The folder to write: a new or an empty one."""
    to: Literal["auto", "open_muse", "amused"] = "auto"
    """The layout to write; auto takes the one that input is not in."""
    resolution: int | None = None
    """Side, in pixels, of the pictures the model makes, which checkpoints do not say and diffusers
    wants to know; null: 256, or 512 where the transformer halves its grid. A transformer by itself
    is taken to have codes of 16 pixels."""
    revision: str | None = None
    """Branch, tag or commit of a repository on the hub."""


def main(argv: list[str] | None = None) -> int:
    """Converts and says what was done; returns the exit status (2: refused)."""
    config = load_command_config(ConvertConfig, argv, __doc__ or "")
    try:
        run(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: ConvertConfig) -> None:
    """What main does, with errors as exceptions."""
    out = Path(config.output)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"output={out} is there already: choose a new or empty folder")
    source = find_input(config.input, config.revision)
    kind = kind_of(source)
    convert, layout, opened_by = KINDS[kind]
    if config.to not in ("auto", layout):
        raise ValueError(f"input={source} is {kind}: it can become {layout}, not {config.to}")
    print(f"{source} is {kind}")
    with atomic_directory(out) as folder:
        for line in convert(source, folder, config.resolution):
            print(f"  {line}", flush=True)
    print(f"wrote {out}, which {opened_by} opens")


def find_input(name: str, revision: str | None) -> Path:
    """The file or folder itself, or a hub repository's folder, weights and all, in the cache."""
    if Path(name).exists():
        return Path(name)
    folder = find_folder(name, revision)
    for path in folder.rglob(CONFIG_NAME):  # the weights that each model needs, in one form only
        part = str(path.parent.relative_to(folder))
        find_model(name, None if part == "." else part, revision)
    return folder


def kind_of(source: Path) -> str:
    """The key of KINDS for a file or folder. Raises ValueError for a folder of something else."""
    if source.is_file():
        with source.open("rb") as file:  # a zip, or a pickle of the time before
            return (
                "a PyTorch checkpoint" if file.read(1) in (b"P", b"\x80") else "a flax checkpoint"
            )
    if (source / INDEX).is_file():
        return "a diffusers pipeline"
    if (source / CONFIG_NAME).is_file():
        class_name = read_config(source).get("_class_name")
        return "a diffusers model" if class_name in ("UVit2DModel", "VQModel") else "our model"
    if all((source / part / CONFIG_NAME).is_file() for part in ("vae", "transformer")):
        return "our pipeline"
    found = ", ".join(sorted(entry.name for entry in source.iterdir()))
    raise ValueError(
        f"input={source} is no pipeline ({INDEX}, or vae/ and transformer/) and no model "
        f"({CONFIG_NAME}); it holds: {found}"
    )


def import_pipeline(source: Path, out: Path, resolution: int | None) -> Iterator[str]:
    """A diffusers aMUSEd pipeline as ours, part by part; yields what was done."""
    index = json.loads((source / INDEX).read_text())
    for part in ("text_encoder", "transformer", "vqvae"):
        if index.get(part) != THEIR_CLASSES[part]:
            raise ValueError(f"{source} has {index.get(part)} as {part}, not {THEIR_CLASSES[part]}")
    refuse_resolution(resolution)
    yield import_one(source / "vqvae", out / "vae")
    yield import_one(source / "transformer", out / "transformer")
    yield copy_text_parts(source, out)
    settings = read_settings(source, load_transformer(out / "transformer"))
    (out / SETTINGS).write_text(json.dumps(asdict(settings), indent=2) + "\n")
    yield f"{SETTINGS}: grid={settings.grid}, noise_schedule={settings.noise_schedule}"


def export_pipeline(source: Path, out: Path, resolution: int | None) -> Iterator[str]:
    """Our text-to-image pipeline as a diffusers aMUSEd pipeline; yields what was done."""
    encoder = source / "text_encoder"
    classes = read_config(encoder).get("architectures") if encoder.is_dir() else None
    if classes != THEIR_CLASSES["text_encoder"][1:]:
        raise ValueError(f"{encoder} holds {classes}, aMUSEd's a CLIPTextModelWithProjection")
    yield export_one(source / "vae", out / "vqvae")
    vq = read_config(out / "vqvae")
    if vq["vq_embed_dim"] is not None:
        raise ValueError(
            f"{source / 'vae'} has z_channels={vq['latent_channels']} and quantized_embed_dim="
            f"{vq['vq_embed_dim']}: AmusedPipeline decodes only if they are equal"
        )
    transformer = load_transformer(source / "transformer")
    settings = read_settings(source, transformer)
    if settings.noise_schedule not in ("cosine", "linear"):
        raise ValueError(f"AmusedScheduler has no noise_schedule={settings.noise_schedule}")
    height, width = settings.grid or default_grid(transformer)
    if resolution is None and height != width:
        raise ValueError(f"diffusers makes squares by itself, not {height}x{width}: set resolution")
    side = resolution // 2 ** (len(vq["block_out_channels"]) - 1) if resolution else height
    yield export_one(source / "transformer", out / "transformer", side)
    yield copy_text_parts(source, out)
    yield f"scheduler: {write_scheduler(out, transformer.mask_token_id, settings.noise_schedule)}"
    index = {"_class_name": "AmusedPipeline", **THEIR_CLASSES}
    if not (out / "tokenizer" / "vocab.json").is_file():  # one file, as transformers 5 writes it
        index["tokenizer"] = ["transformers", "CLIPTokenizerFast"]  # which older ones can read
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def import_model(source: Path, out: Path, resolution: int | None) -> Iterator[str]:
    """A diffusers UVit2DModel or VQModel as our model directory; yields what was done."""
    refuse_resolution(resolution)
    yield import_one(source, out)
    config = read_config(source)
    if config["_class_name"] == "UVit2DModel":
        side = config.get("sample_size", 64)
        yield f"left out: sample_size={side}, the side in codes that diffusers makes by itself"


def export_model(source: Path, out: Path, resolution: int | None) -> Iterator[str]:
    """Our MaskGiTUViT or VQGANModel as a diffusers model; yields what was done."""
    yield export_one(source, out, resolution // 16 if resolution else None)


def import_one(source: Path, out: Path) -> str:
    """One diffusers model as our model directory; returns what was done."""
    theirs = read_config(source).get("_class_name")
    load = pictures.amused_vq.load_amused_vq if theirs == "VQModel" else load_amused_transformer
    model = load(source)
    model.save_pretrained(out)
    return f"{theirs} -> {type(model).__name__}: {size_of(model)}"


def export_one(source: Path, out: Path, sample_size: int | None = None) -> str:
    """One model directory of ours as a diffusers model; returns what was done."""
    ours = read_config(source).get("_class_name")
    if ours == "VQGANModel":
        vq = pictures.amused_vq.VQGANModel.from_pretrained(source)
        pictures.amused_vq.save_amused_vq(vq, out)
        return f"{ours} -> VQModel: {size_of(vq)}"
    if ours in ("MaskGiTUViT", "MaskGiTUViT_v2"):
        transformer = MaskGiTUViT.from_pretrained(source)
        save_amused_transformer(transformer, out, sample_size)
        side = read_config(out)["sample_size"]
        return f"{ours} -> UVit2DModel for {side}x{side} codes: {size_of(transformer)}"
    raise ValueError(f"{source} holds a {ours}; aMUSEd has a layout for MaskGiTUViT and VQGANModel")


def refuse_resolution(resolution: int | None) -> None:
    if resolution:
        raise ValueError(f"resolution={resolution} has no place in our models: leave it away")


def import_taming(source: Path, out: Path, resolution: int | None) -> Iterator[str]:
    """A taming-transformers checkpoint as a VQGANModel; yields what was done."""
    yield from save_imported(*pictures.taming.load_taming(source, resolution or 256), out)


def import_maskgit(source: Path, out: Path, resolution: int | None) -> Iterator[str]:
    """MaskGIT's JAX tokenizer as a MaskGitVQGAN; yields what was done."""
    yield from save_imported(*pictures.maskgit_jax.load_maskgit_jax(source, resolution or 256), out)


def save_imported(model: PretrainedModel, left_out: list[str], out: Path) -> Iterator[str]:
    model.save_pretrained(out)
    yield f"{type(model).__name__}: {size_of(model)}"
    yield f"config, read off the weights; resolution as given or assumed: {asdict(model.config)}"
    yield from (f"left out: {line}" for line in left_out)


def copy_text_parts(source: Path, out: Path) -> str:
    """Copies text encoder and tokenizer into two folders; ours may have both in one."""
    encoder, tokenizer = source / "text_encoder", source / "tokenizer"
    weights = next((name for name in TEXT_WEIGHTS if (encoder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{encoder} has no weights; looked for {', '.join(TEXT_WEIGHTS)}")
    (out / "text_encoder").mkdir()
    shutil.copy(encoder / CONFIG_NAME, out / "text_encoder")
    shutil.copy(encoder / weights, out / "text_encoder" / weights.replace(".fp16", ""))
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, out / "tokenizer")
    else:
        rest = shutil.ignore_patterns(CONFIG_NAME, *TEXT_WEIGHTS)
        shutil.copytree(encoder, out / "tokenizer", ignore=rest)
    return f"text_encoder ({weights}) and tokenizer: copied"


def write_scheduler(out: Path, mask_token_id: int, schedule: str) -> str:
    config = {
        "_class_name": "AmusedScheduler",
        "mask_token_id": mask_token_id,
        "masking_schedule": schedule,
    }
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return ", ".join(f"{key}={value}" for key, value in config.items())


def size_of(model: PretrainedModel) -> str:
    tensors = model.state_dict().values()
    return f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors):,} parameters"


Convert = Callable[[Path, Path, int | None], Iterator[str]]
KINDS: dict[str, tuple[Convert, str, str]] = {  # how to convert it, to what, and what opens that
    "a diffusers pipeline": (import_pipeline, "open_muse", "MusePipeline.from_pretrained"),
    "our pipeline": (export_pipeline, "amused", "diffusers.AmusedPipeline.from_pretrained"),
    "a diffusers model": (import_model, "open_muse", "from_pretrained"),
    "our model": (export_model, "amused", "diffusers' from_pretrained"),
    "a PyTorch checkpoint": (import_taming, "open_muse", "from_pretrained"),
    "a flax checkpoint": (import_maskgit, "open_muse", "from_pretrained"),
}


if __name__ == "__main__":
    sys.exit(main())
