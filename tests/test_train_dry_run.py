"""The dry run: what it says is what the run would have, and it needs no codes, GPU or space."""

import re
import shutil

import pytest
import torch
from store_factory import make_store

from configs.load import ConfigError, load_config
from train_stage.config import TrainConfig
from train_stage.models.sizes import count_parameters
from train_stage.models.transformer import MaskGitTransformer
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.objective.masking import draw_mask
from train_stage.training.dry_run import describe, expected_masked

FIELDS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("dry") / "data", backend="zarr")


def dry_run(store, *options, device="cuda"):
    options = [f"model.transformer.{name}={value}" for name, value in FIELDS.items()] + [*options]
    required = {
        "dataset.train_store": store,
        "experiment.output_dir": store.parent / "run",
        "training.max_train_steps": 60,
        "optimizer.params.learning_rate": 1e-3,
        "training.batch_size": 30,
    }
    argv = [f"{key}={value}" for key, value in required.items()]
    return describe(load_config(TrainConfig, [*argv, *options]), device)


def memory_of(text):
    """GB by name."""
    return {name: float(size) for size, name in re.findall(r"([\d.]+) GB  (.+)", text)}


def test_it_says_what_the_run_would_have(store):
    text = dry_run(store)
    assert f"{store}: 300 rows of 4 x 4 codes in [0, 60), by {store.parent / 'vq'}" in text
    assert "epoch       10.0 steps; 60 steps are 6.0 epochs" in text
    model = MaskGitTransformer(codebook_size=60, num_vq_tokens=16, num_classes=10, **FIELDS)
    assert f"{count_parameters(model) / 1e6:.2f} M parameters: embeddings" in text
    assert "30 rows = 1 processes x 1 passes x 30 rows; 64% of the codes are masked" in text
    memory = memory_of(text)
    assert memory["weights"] == pytest.approx(4e-9 * count_parameters(model), abs=1e-3)
    assert memory["at most at once"] > memory["weights"] + memory["adamw state"]
    assert re.search(r"time .* h at 20%, .* 1 H100 \(495 TFLOP/s in tf32\)", text)
    assert not (store.parent / "run").exists()


def test_no_codes_are_read(store, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    for folder in copy.rglob("codes.zarr"):
        shutil.rmtree(folder / "c")
    assert "300 rows" in dry_run(copy)


def test_options_change_what_they_should(store, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = dry_run(
        store,
        "training.global_batch_size=240",
        "training.use_ema=true",
        "training.mixed_precision=bf16",
        "training.min_masking_rate=1.0",
        "optimizer.name=lion",
        "dataset.filter=class_id < 5",
        "experiment.max_train_examples=100",
    )
    assert "240 rows = 2 processes x 4 passes x 30 rows; 100% of the codes" in text
    assert ": 100 rows of" in text and "2 H100 (1,978 TFLOP/s in bf16)" in text
    memory = memory_of(text)
    assert memory["moving average"] == memory["lion state"] == memory["weights"]
    assert "gradients on their way to other processes" in memory


def test_checkpointing_and_attention(store):
    def activations(*options):
        return memory_of(dry_run(store, *options))["activations of a pass"]

    large = ["training.batch_size=300", "model.transformer.num_hidden_layers=4"]
    plain = activations(*large)
    assert activations(*large, "model.gradient_checkpointing=true") < plain / 3
    assert activations(*large, "model.attention=plain") > plain


@pytest.mark.parametrize("name", ["cosine", "linear", "pow3"])
@pytest.mark.parametrize("least", [0.0, 0.4])
def test_the_expected_share_is_that_of_the_masks(name, least):
    schedule, generator = get_mask_schedule(name), torch.Generator().manual_seed(0)
    drawn = draw_mask(20_000, 16, schedule, generator, least).mask.sum(-1).float().mean()
    assert expected_masked(schedule, 16, least) == pytest.approx(drawn.item(), rel=0.01)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("model.transformer.codebook_size=61", "follows the store"),
        ("training.global_batch_size=1", None),
        ("mask_schedule.schedule=cos", "legal are cosine"),
        ("dataset.filter=class_id > 99", "none of its 300 rows"),
    ],
)
def test_it_refuses_what_the_run_refuses(store, option, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2" if words is None else "1")
    with pytest.raises((ConfigError, ValueError), match=words):
        dry_run(store, option)
