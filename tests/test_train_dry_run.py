"""The dry run: what it says is what the run would have, and it needs no codes, GPU or space."""

import re
import shutil

import pytest
import torch
from store_factory import make_store
from text_factory import make_clip, make_t5
from text_store import make_text_store
from torch.utils.flop_counter import FlopCounterMode

from configs.load import ConfigError, load_config
from tokenize_stage.text.text_encoder import TextEncoder
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


def test_processes_share_what_is_sharded(store, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    wide = ["model.transformer.hidden_size=512", "training.use_ema=true", "training.batch_size=4"]
    fsdp, kinds = [*wide, "training.parallel=fsdp"], ("weights", "adamw state", "moving average")
    whole, shard = memory_of(dry_run(store, *wide)), memory_of(dry_run(store, *fsdp))
    for kind in kinds:
        assert shard[kind] == pytest.approx(whole[kind] / 4, abs=1e-3)
    assert shard["gradients"] == pytest.approx(whole["gradients"] / 4, abs=1e-3)
    assert shard["activations of a pass"] == whole["activations of a pass"]
    assert shard["at most at once"] < 0.6 * whole["at most at once"]
    again = memory_of(dry_run(store, *fsdp, "training.fsdp.reshard_after_forward=false"))
    assert again["gathered weights"] >= shard["gathered weights"]
    often = memory_of(dry_run(store, *fsdp, "training.gradient_accumulation_steps=2"))
    assert often["gradients"] == whole["gradients"]  # until the last pass


def test_gradients_that_wait_for_other_processes(store, monkeypatch):
    """DDP's buckets are there while activations are; one process has gradients only after."""
    wide = ["model.transformer.hidden_size=512", "training.batch_size=120"]
    alone = memory_of(dry_run(store, *wide))
    monkeypatch.setenv("WORLD_SIZE", "4")
    many = memory_of(dry_run(store, *wide))
    assert alone["at most at once"] < many["at most at once"]
    least = [
        many[name] for name in ("weights", "adamw state", "gradients", "activations of a pass")
    ]
    assert many["at most at once"] > 0.99 * sum(least)


def tflop_of(text):
    """(of a step, of the text encoders)."""
    found = re.search(r"operations +([\d.]+) TFLOP.*?(?:, ([\d.]+) the text|;)", text)
    return float(found[1]), float(found[2] or 0)


def test_what_the_objective_scores(store):
    wide = ["training.batch_size=3000", "model.transformer.hidden_size=512"]
    plain, every = (
        dry_run(store, *wide, f"training.predict_all_tokens={flag}") for flag in (False, True)
    )
    assert "64% of the codes are masked" in plain and "100% of the codes are scored" in every
    conditioned = dry_run(store, *wide, "model.transformer.self_conditioning=true")
    judged = dry_run(store, *wide, "model.transformer.critic_head=true", "training.critic=self")
    base = tflop_of(plain)[0]
    assert base < tflop_of(every)[0] < 1.2 * base
    assert 1.1 * base < tflop_of(conditioned)[0] < 1.3 * base  # half of the steps, one in three
    assert 1.7 * base < tflop_of(judged)[0] < 2 * base
    soft = ["training.soft_targets=recomputed", "training.soft_target_codes=4"]
    assert tflop_of(dry_run(store, *wide, *soft))[0] == pytest.approx(base, rel=0.02)


UVIT = [
    "model.architecture=uvit",
    "model.transformer.in_channels=16",
    "model.transformer.block_out_channels=[16]",
    "model.transformer.block_num_heads=2",
    "model.transformer.num_res_blocks=1",
]


@pytest.mark.parametrize("architecture", [[], UVIT], ids=["transformer", "uvit"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_text_is_counted_as_its_encoders_run(texts, architecture, checkpointing):
    store, encoders = texts
    words = [*architecture, f"model.gradient_checkpointing={checkpointing}"]
    words += [f"model.text_encoders.{name}={{}}" for name in encoders]
    text = dry_run(store, *words, "training.batch_size=20000")
    flops = 0
    for name, place in encoders.items():
        encoder = TextEncoder.from_pretrained(place)
        ids = torch.zeros(1, encoder.max_length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            encoder.encode_ids(ids)
        flops += counter.get_total_flops()
        parameters = count_parameters(encoder.model)
        assert f"{name}: {parameters / 1e6:.2f} M parameters, frozen, in float32" in text
    assert tflop_of(text)[1] == pytest.approx(20_000 * flops / 1e12, abs=0.006)
    assert tflop_of(text)[0] > tflop_of(text)[1] > 0
    once = dry_run(store, *words, "training.batch_size=20000", "dataset.filter=class_id < 3")
    assert tflop_of(once) == tflop_of(text)


def test_stored_states_are_not_made_again(texts, tmp_path):
    _, encoders = texts
    store = make_text_store(tmp_path, {"t5": encoders["t5"]}, states=["t5"])
    text = dry_run(store, "model.text_encoders.t5={}")
    assert "not run on rows" in text and tflop_of(text)[1] == 0


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A store with texts, and its encoders."""
    root = tmp_path_factory.mktemp("dry-texts")
    encoders = {"clip": make_clip(root / "clip"), "t5": make_t5(root / "t5")}
    return make_text_store(root, encoders), encoders


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
