"""Every recipe of configs/train: three real steps at scale=tiny, its full size, and its header.

What a header says is counted again, for the store that its recipe of configs/tokenize makes and for
the published text encoders, of which a config.json is enough.
"""

import json
import math
import re
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from store_factory import SIZES
from text_factory import make_bert, make_clip, make_t5
from text_store import CAPTION, SUBJECTS

from configs.load import load_config
from storage.pretrained import model_fingerprint
from storage.schema import ArrayColumn, StoreMeta, Tokenizer
from storage.writer import ShardWriter, create_store
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.text.config import TextConfig
from tokenize_stage.text.text_columns import TextColumns
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from train_stage.config import TrainConfig
from train_stage.models.sizes import SCALED_DOWN
from train_stage.train import main as train
from train_stage.training.dry_run import Plan, make_plan, summary
from train_stage.training.process_memory import PEAK

CONFIGS = Path(__file__).parents[1] / "configs"
README = (CONFIGS.parent / "README.md").read_text()
TRAIN = sorted((CONFIGS / "train").glob("*.yaml"))
MADE_BY = {  # the recipe of the store, for the stages of the plan
    "imagenet": "imagenet_f16",
    "cc12m_clip": "cc12m_f16_clip_t5",
    "cc12m_t5": "cc12m_f16_clip_t5",
    "cc12m_clip_t5": "cc12m_f16_clip_t5",
    "cc12m_self_conditioning": "cc12m_f16_clip_t5",
    "laion_coyo_256": "laion_coyo_f16_f8_clip_256",
    "laion_coyo_512": "laion_coyo_f16_f8_clip_512",
    "research_512": "laion_coyo_f16_f8_clip_512",
}
GPUS = 8  # that the headers speak of
VQ = {  # codebook size, pixels of a code's side
    "openMUSE/maskgit-vqgan-imagenet-f16-256": (1024, 16),
    "openMUSE/vqgan-f16-8192-laion": (8192, 16),
    "openMUSE/paellavq-f8-8192-laion": (8192, 8),
}
CLIP_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
ENCODERS = {  # as published
    "openai/clip-vit-large-patch14": {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {"model_type": "clip_text_model", **CLIP_TEXT},
    },
    "google/t5-v1_1-large": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_layers": 24,
        "num_heads": 16,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
}
LENGTHS = {"openai/clip-vit-large-patch14": 77}  # where the recipe gives none


def used(path, key):
    """What a recipe says of a key, None if nothing."""
    return OmegaConf.select(OmegaConf.load(path), key)


def fill(path, **known):
    """Words for what a recipe leaves open."""
    missing = OmegaConf.missing_keys(OmegaConf.load(path))
    return [f"{key}={known.get(key.split('.')[-1], 'anything')}" for key in sorted(missing)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a real store of 8 x 8 px, under every name that a recipe trains on."""
    root = tmp_path_factory.mktemp("configs")
    names = {name for path in TRAIN for name in used(path, "model.text_encoders") or {}}
    kinds = {"clip": make_clip, "t5": make_t5}
    encoders = {name: kinds.get(name, make_bert)(root / name) for name in sorted(names)}
    columns = {"codes"} | {used(path, "dataset.codes_column") or "codes" for path in TRAIN}
    states = [name for name in encoders if name not in kinds]
    make_store(root, TextConfig(encoders, states=states, dtype="float32"), sorted(columns))
    for path in TRAIN:
        mixture = used(path, "dataset.mixture") or []
        for name in [used(path, "dataset.train_store"), *(entry.store for entry in mixture)]:
            if name not in (None, "???") and not (root / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).symlink_to(root / "store")
    return root


def make_store(root, text, columns, rows=60):
    torch.manual_seed(0)
    vq = MaskGitVQGAN(**SIZES)
    vq.save_pretrained(root / "vq")
    tokenizer = Tokenizer(str(root / "vq"), "MaskGitVQGAN", 60, [4, 4], model_fingerprint(vq))
    text = TextColumns(text)
    arrays = {name: ArrayColumn("uint16", [16]) for name in columns} | text.arrays
    transform = {"text": text.record()}
    create_store(root / "store", StoreMeta(8, arrays, dict.fromkeys(columns, tokenizer), transform))
    rng, numbers = np.random.default_rng(0), np.arange(rows)
    captions = [CAPTION.format(SUBJECTS[number % 5]) for number in numbers]
    extra = pa.schema([*text.fields, pa.field("aesthetic_score", pa.float32())])
    with ShardWriter(root / "store", "00000", "0.tar", extra_columns=extra) as writer:
        writer.add(
            {
                **{name: rng.integers(0, 60, (rows, 16)) for name in columns},
                "key": [str(number) for number in numbers],
                "class_id": numbers % 5,
                "caption": captions,
                "original_height": 100 + numbers,
                "original_width": 300 + numbers,
                **{f"crop_{side}": numbers / 2 for side in ("top", "left")},
                **{f"crop_{side}": np.full(rows, 16.0) for side in ("height", "width")},
                "aesthetic_score": 4 + 2 * numbers / rows,
                **text.columns(captions),
            }
        )


@pytest.fixture
def any_precision():
    """accelerate's is the process's; the runs of this file have several."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_three_real_steps(path, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    words = [f"config={path}", "scale=tiny", "training.max_train_steps=3"]
    words += ["experiment.log_every=1", "experiment.generate_every=3", "generation.timesteps=1"]
    words += ["generation.classes=2", "generation.images_per_class=1"]
    words += fill(path, train_store=place / "store", output_dir="unused")
    assert train([*words, f"experiment.output_dir={tmp_path / 'run'}"]) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert (tmp_path / "run/samples/step-00000003.png").is_file()
    written = load_config(TrainConfig, [f"config={tmp_path / 'run/config.yaml'}"])
    again = load_config(TrainConfig, [f"config={tmp_path / 'run/config.yaml'}", "scale=tiny"])
    assert written == again and written.scale == "tiny"
    small = SCALED_DOWN[written.model.architecture]
    assert written.model.transformer.items() >= small.items()


def test_tiny_shrinks_what_is_large_and_leaves_the_rest():
    path = CONFIGS / "train/research_512.yaml"
    full, tiny = (
        load_config(TrainConfig, [f"config={path}", f"scale={scale}", *fill(path)])
        for scale in ("full", "tiny")
    )
    assert full.model.size == "large" and tiny.model.size is None
    assert tiny.model.transformer["force_down_up_sample"]
    assert (full.training.global_batch_size, tiny.training.global_batch_size) == (512, 16)
    assert tiny.training.batch_size == 8 and full.training.compile and not tiny.training.compile
    for name in ("label_smoothing", "mask_contiguous_region_prob", "mixed_precision", "use_ema"):
        assert getattr(full.training, name) == getattr(tiny.training, name)
    assert full.optimizer == tiny.optimizer and full.dataset == tiny.dataset


def published_store(folder, recipe: str) -> Path:
    """A store with the facts of configs/tokenize/RECIPE.yaml, one row, and no such codes."""
    path = CONFIGS / f"tokenize/{recipe}.yaml"
    config = load_config(TokenizeConfig, [f"config={path}", *fill(path)])
    models = {f"codes_{name}": vq.pretrained for name, vq in config.model.vq_models.items()}
    tokenizers = {}
    for name, vq in (models or {"codes": config.model.vq_model.pretrained}).items():
        side = config.dataset.preprocessing.resolution // VQ[vq][1]
        tokenizers[name] = Tokenizer(vq, "VQ", VQ[vq][0], [side, side], "f" * 64)
    texts = {}
    for name, encoder in config.text.tokenizers.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(ENCODERS[encoder]))
        length = config.text.lengths.get(name) or LENGTHS[encoder]
        texts[name] = {"name": str(folder / name), "length": length}
    sizes = {name: math.prod(tokenizer.grid) for name, tokenizer in tokenizers.items()}
    arrays = {name: ArrayColumn("uint16", [size]) for name, size in sizes.items()}
    transform = {"text": {"tokenizers": texts}}
    resolution = config.dataset.preprocessing.resolution
    create_store(folder / "store", StoreMeta(resolution, arrays, tokenizers, transform))
    with ShardWriter(folder / "store", "00000", "0.tar") as writer:
        codes = {name: np.zeros((1, size)) for name, size in sizes.items()}
        writer.add({**codes, "key": ["0"], "class_id": [999]})
    return folder / "store"


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Each stage's Plan, made when it is first asked for."""
    made: dict[str, Plan] = {}

    def plan_of(stage: str) -> Plan:
        if stage not in made:
            store = published_store(tmp_path_factory.mktemp(stage), MADE_BY[stage])
            path = CONFIGS / f"train/{stage}.yaml"
            config = load_config(TrainConfig, [f"config={path}", *fill(path, train_store=store)])
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WORLD_SIZE", str(GPUS))
                made[stage] = make_plan(config)
        return made[stage]

    return plan_of


@pytest.mark.parametrize("stage", MADE_BY)
def test_the_header_is_what_is_counted(stage, plans):
    text = (CONFIGS / f"train/{stage}.yaml").read_text()
    assert text.count("\n") <= 30
    header = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    right = summary(plans(stage)) + "."
    lines = textwrap.wrap(right, 100, initial_indent="# ", subsequent_indent="# ")
    assert re.sub(r"\s+", " ", right) in header, "its header is to say:\n" + "\n".join(lines)


@pytest.mark.parametrize("stage", MADE_BY)
def test_the_readme_has_the_same_numbers(stage, plans):
    plan, training = plans(stage), plans(stage).config.training
    row = next(line for line in README.splitlines() if line.startswith(f"| `{stage}` |"))
    parameters = sum(p.numel() for p in plan.model.parameters())
    assert [cell.strip() for cell in row.split("|")][4:-1] == [
        f"{parameters / 1e6:.1f} M",
        f"{training.max_train_steps:,} of {training.global_batch_size:,}",
        f"{plan.memory[PEAK] / 1e9:.1f}",
        f"{plan.gpu_hours(0.4):.0f}",
    ]


def test_the_whole_model_is_that_of_the_literature(plans):
    """Of the stages, at full size, without data; sizes of models as published or known."""
    millions = {
        stage: sum(p.numel() for p in plans(stage).model.parameters()) / 1e6 for stage in MADE_BY
    }
    assert millions["imagenet"] == pytest.approx(231, abs=1)
    assert millions["laion_coyo_256"] == millions["laion_coyo_512"]
    assert millions["laion_coyo_256"] == pytest.approx(604, abs=2)  # aMUSEd-256
    assert millions["research_512"] == pytest.approx(608, abs=6)  # aMUSEd-512
    tensors = plans("research_512").model.parameters()
    assert all(parameter.device.type == "meta" for parameter in tensors)


def test_every_recipe_of_the_plan_has_a_header():
    demos = {"emoji", "fashion_mnist", "mixture"}
    assert {path.stem for path in TRAIN} == MADE_BY.keys() | demos
