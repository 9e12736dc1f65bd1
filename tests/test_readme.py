"""The README's Python blocks run as they stand, in order; its commands and files exist."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenize_stage.encode import main as tokenize
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
HUB_NAME = "openMUSE/maskgit-vqgan-imagenet-f16-256"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the README speaks of: photos, a store, the tokenizer in the hub's cache.

    The tokenizer has the published grid and codebook, but few channels and random weights.
    """
    folder = tmp_path_factory.mktemp("readme")
    vq = MaskGitVQGAN(hidden_channels=32, channel_mult=(1, 1, 1, 1, 1), num_res_blocks=1,
                      z_channels=32, quantized_embed_dim=32)  # fmt: skip
    repo = folder / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    vq.save_pretrained(repo / "snapshots" / ("0" * 40))
    rng = np.random.default_rng(0)
    for index in range(6):
        path = folder / "photos" / f"class-{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 90, 3), np.uint8)).save(path)
    shutil.copy(folder / "photos" / "class-0" / "0.jpg", folder / "picture.jpg")
    return folder


@pytest.fixture
def in_workplace(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workplace / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if not Path("store").exists():
        code = tokenize(
            ["dataset.shards_path_or_url=photos/", "store.path=store/",
             f"model.vq_model.pretrained={HUB_NAME}"]
        )  # fmt: skip
        assert code == 0


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_block(in_workplace, index):
    exec(compile(BLOCKS[index], f"README.md block {index}", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) == 4


def test_files_and_options_named_in_the_readme_exist():
    for name in re.findall(r"`((?:tokenize_stage|train_stage|storage)/[\w/]+(?:\.py|/))`", README):
        assert (ROOT / name).exists(), name
    options = re.findall(r"^    ([a-z_]+\.[a-z_.]+)=", README, re.MULTILINE)
    assert options
