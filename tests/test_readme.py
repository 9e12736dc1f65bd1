"""The README's Python blocks run as they stand, in order, and so do its four commands.

The options of every other command line, and the files it names, exist.
"""

import re
import shlex
import shutil
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from PIL import Image
from pipeline_factory import make_pipeline

from configs.load import _walk, load_config
from storage.cli import main as muse_store
from storage.reader import TokenStore
from tokenize_stage.cli import main as muse_tokenize
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.cost.config import EstimateConfig
from tokenize_stage.quality.config import AuditConfig
from tokenize_stage.selection.config import DedupConfig, ScanConfig
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq_training.config import TrainVQConfig
from train_stage.config import TrainConfig
from train_stage.convert import ConvertConfig
from train_stage.demo import DemoConfig
from train_stage.evaluate import EvaluateConfig
from train_stage.evaluate import main as muse_evaluate
from train_stage.generate import GenerateConfig
from train_stage.generate import main as muse_generate
from train_stage.models.sizes import size_table
from train_stage.train import main as muse_train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TOKENIZE_README = (ROOT / "tokenize_stage/README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
HUB_NAME = "openMUSE/maskgit-vqgan-imagenet-f16-256"
PIPELINE_NAME = "amused/amused-256"
SCHEMAS = {
    "muse-tokenize": TokenizeConfig,
    "muse-train-vq": TrainVQConfig,
    "muse-train": TrainConfig,
    "muse-generate": GenerateConfig,
    "muse-evaluate": EvaluateConfig,
    "muse-convert": ConvertConfig,
    "muse-demo": DemoConfig,
}
SUBCOMMANDS = {
    "muse-train report": muse_train,
    "muse-train average": muse_train,
    "muse-evaluate captions": muse_evaluate,
}
STAGE_ONE = {  # of muse-tokenize's commands that take options
    "encode": TokenizeConfig,
    "plan": TokenizeConfig,
    "estimate": EstimateConfig,
    "scan": ScanConfig,
    "dedup": DedupConfig,
    "audit": AuditConfig,
}
MAINS = {
    "muse-tokenize": muse_tokenize,
    "muse-store": muse_store,
    "muse-train": muse_train,
    "muse-generate": muse_generate,
}
# What makes the README's own pipeline small enough for a test: nothing that it is about.
SMALLER = {
    "muse-train": ["training.max_train_steps=2", "training.batch_size=2"]
    + ["lr_scheduler.params.warmup_steps=1", "model.transformer.hidden_size=32"]
    + ["model.transformer.num_attention_heads=2", "model.transformer.num_hidden_layers=1"]
    + ["model.transformer.intermediate_size=32"],
    "muse-generate": ["images_per_class=2", "timesteps=2"],
}


def commands_in(text):
    """The muse-… commands of some shell lines, each as its words."""
    for name, value in re.findall(r"^([A-Z]+)=(\S+)$", text, re.MULTILINE):
        text = text.replace(f'"${name}"', value).replace(f"${name}", value)
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [command for command in words if command and command[0].startswith("muse-")]


BASH = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
PIPELINE = next(commands_in(block) for block in BASH if "photos/" in block)
STORE_COMMANDS = next(commands_in(block) for block in BASH if "muse-store drop" in block)
COMMANDS = [command for block in BASH for command in commands_in(block)]
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
COMMANDS += [
    command
    for block in re.findall(r"```bash\n(.*?)```", TOKENIZE_README, re.DOTALL)
    for command in commands_in(block)
]
COMMANDS += [words for code in re.findall(r"`(muse-[^`]+)`", PROSE) for words in commands_in(code)]


def run(command):
    """Runs a README command in this process."""
    name, *words = command
    assert MAINS[name]([*words, *SMALLER.get(name, [])]) == 0, shlex.join(command)


def snapshot(hub, name):
    """The folder of a repository's files in the hub's cache."""
    repo = hub / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return repo / "snapshots" / ("0" * 40)


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """A folder with what the README speaks of: photos, a store, models in the hub's cache.

    The tokenizer has the published grid and codebook, but few channels and random weights; the
    pipeline's parts are small, too.
    """
    folder = tmp_path_factory.mktemp("readme")
    vq = MaskGitVQGAN(hidden_channels=32, channel_mult=(1, 1, 1, 1, 1), num_res_blocks=1,
                      z_channels=32, quantized_embed_dim=32)  # fmt: skip
    vq.save_pretrained(snapshot(folder / "hub", HUB_NAME))
    make_pipeline().save_pretrained(snapshot(folder / "hub", PIPELINE_NAME))
    rng = np.random.default_rng(0)
    for index in range(6):
        path = folder / "photos" / f"class-{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 90, 3), np.uint8)).save(path)
    shutil.copy(folder / "photos" / "class-0" / "0.jpg", folder / "picture.jpg")
    Image.new("L", (90, 80), "white").save(folder / "mask.png")
    return folder


@pytest.fixture
def in_playground(playground, monkeypatch):
    monkeypatch.chdir(playground)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(playground / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if not Path("store").exists():
        run(PIPELINE[0])


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_block(in_playground, index):
    exec(compile(BLOCKS[index], f"README.md block {index}", "exec"), {})


def test_stores_are_looked_after(in_playground):
    keys = TokenStore("store").table(["key"])
    scores = keys.append_column("score", pa.array(np.arange(len(keys)) / 10))
    pq.write_table(scores, "scores.parquet")
    for command in STORE_COMMANDS:
        run(command)
    assert len(TokenStore("store-all")) == len(TokenStore("store-arrow")) == len(keys)
    assert TokenStore("store-arrow").meta.backend == "arrow"
    assert list(Path("tars").glob("*.tar"))


def test_there_are_blocks():
    assert len(BLOCKS) == 5


def test_the_four_commands_turn_photos_into_pictures(in_playground):
    names = [command[0] for command in PIPELINE]
    assert names == ["muse-tokenize", "muse-store", "muse-store", "muse-train", "muse-generate"]
    for command in PIPELINE[1:]:
        run(command)
    pictures = sorted(Path("pictures").glob("*/*.png"))
    assert [path.parent.name for path in pictures] == ["0", "0", "1", "1"]
    assert {Image.open(path).size for path in pictures} == {(256, 256)}


@pytest.mark.parametrize("command", COMMANDS, ids=shlex.join)
def test_commands_have_these_options(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    name, *words = command
    if name == "muse-store":
        with pytest.raises(SystemExit) as stop:
            muse_store([*words[:1], "--help"])
        assert stop.value.code == 0
        return
    schema = SCHEMAS.get(name)
    if " ".join([name, *words[:1]]) in SUBCOMMANDS:
        with suppress(SystemExit):
            assert SUBCOMMANDS[f"{name} {words[0]}"]([words[0], "--help"]) == 0
        assert f"{name} {words[0]}" in capsys.readouterr().out
        return
    if name == "muse-tokenize" and words and "=" not in words[0]:
        schema = STAGE_ONE.get(words[0])
        if schema is None or len(words) == 1:
            with suppress(SystemExit):  # argparse's way to end
                assert muse_tokenize([words[0], "--help"]) == 0
            assert words[0] in capsys.readouterr().out
            return
        words = [w for w in words[1:] if not w.startswith("--")]
    words = [w for w in words if "…" not in w and "FILE" not in w and w != "--dry-run"]
    words = [w for w in words if "/work/config.yaml" not in w and not w.startswith("--")]
    missing = OmegaConf.missing_keys(OmegaConf.structured(schema))
    given = {"model.vq_model.pretrained"} if issubclass(schema, TokenizeConfig) else set()
    given = set() if any(w.startswith("config=") for w in words) else given
    load_config(schema, [*(f"{key}=1" for key in {*missing, *given}), *words])


def test_the_table_of_sizes_is_what_is_computed():
    assert size_table("transformer") in README


def test_prose_names_modules_files_and_options_that_exist():
    modules = set(re.findall(r"-m ([\w.]+)", PROSE)) - {"package.module"}
    assert "train_stage.train" in modules
    for module in modules:
        assert find_spec(module), module
    packages = "configs|tokenize_stage|train_stage|storage|tests|slurm"
    for name in re.findall(rf"[`(]((?:{packages})/[\w/]*(?:\.\w+)?)[`)]", PROSE):
        assert (ROOT / name).exists(), name
    keys = {key for schema in SCHEMAS.values() for key, *_ in _walk(schema)}
    ours = re.sub(r"## Coming from open-muse.*?## ", "", PROSE, flags=re.DOTALL)
    sections = "|".join({key.split(".")[0] for key in keys if "." in key})
    named = set(re.findall(rf"`((?:{sections})\.[a-z][a-z_.]*)[`=]", ours)) - {"store.json"}
    assert "training.global_batch_size" in named
    assert named <= keys
