"""Training options one by one, each seen to do what it says."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_factory import make_store
from test_train_resume import SMALL, refused, run_to_end

from train_stage.models.config import ModelConfig
from train_stage.models.sizes import size_fields
from train_stage.train import main as train_main

STEPS = 12


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


def train(store, run, *extra):
    argv = [f"dataset.train_store={store}", f"experiment.output_dir={run}", *SMALL, *extra]
    assert run_to_end(argv) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


def test_loss_starts_at_log_v_and_metrics_are_all_there(store, tmp_path):
    first = train(store, tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(4.85, abs=0.25)  # ln(128), the padded vocabulary
    assert {"accuracy", "learning_rate", "grad_norm", "images_per_s", "data_wait"} <= set(first)
    assert any(name.startswith("loss_masked_") for name in first)
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "learning_rate: 0.003" in config and "beta2: 0.999" in config


def test_bf16_follows_float32(store, tmp_path):
    exact = losses(train(store, tmp_path / "a"))
    rough = losses(train(store, tmp_path / "b", "training.mixed_precision=bf16"))
    assert rough == pytest.approx(exact, rel=0.02) and rough != exact
    weights = load_file(tmp_path / "b" / "model" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_gradient_checkpointing_changes_nothing(store, tmp_path):
    plain = train(store, tmp_path / "a")
    saving = train(store, tmp_path / "b", "model.gradient_checkpointing=true")
    assert losses(saving) == losses(plain)


def test_attention_backends_train_alike(store, tmp_path, capfd):
    still = ["model.transformer.hidden_dropout=0", "model.transformer.attention_dropout=0"]
    sdpa = losses(train(store, tmp_path / "a", *still))
    plain = losses(train(store, tmp_path / "b", *still, "model.attention=plain"))
    assert plain == pytest.approx(sdpa, rel=1e-4) and plain != sdpa
    argv = [f"dataset.train_store={store}", f"experiment.output_dir={tmp_path / 'c'}", *SMALL]
    if importlib.util.find_spec("xformers") is None:
        assert "pip install" in refused([*argv, "model.attention=xformers"], capfd)
        assert not (tmp_path / "c").exists()


def test_a_size_fills_in_what_is_not_given(capfd):
    given = ModelConfig(size="tiny", transformer={"hidden_size": 32}).transformer_given()
    assert given == size_fields("tiny") | {"hidden_size": 32} != size_fields("tiny")
    assert ModelConfig(transformer={"hidden_size": 32}).transformer_given() == {"hidden_size": 32}
    with pytest.raises(SystemExit):
        train_main(["experiment.output_dir=nowhere", *SMALL, "model.size=huge"])
    assert "xl" in capfd.readouterr().err


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(store, tmp_path):
    argv = [f"dataset.train_store={store}", f"experiment.output_dir={tmp_path / 'run'}", *SMALL]
    command = [sys.executable, "-m", "train_stage.train", *argv, "--dry-run"]
    root = Path(__file__).parents[1]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "parameters" in said and "FLOP" in said and not (tmp_path / "run").exists()


def test_overfit_one_batch_goes_down_fast(store, tmp_path):
    options = ["training.overfit_one_batch=true", "lr_scheduler.scheduler=constant"]
    options += ["optimizer.params.learning_rate=1e-2", "training.max_train_steps=40"]
    lines = losses(train(store, tmp_path / "run", *options))
    assert min(lines[-5:]) < 0.75 * lines[0]


def test_pretrained_weights_are_where_it_starts(store, tmp_path):
    before = losses(train(store, tmp_path / "a", "training.max_train_steps=40"))
    start = f"model.pretrained_model_path={tmp_path / 'a' / 'checkpoint-40' / 'unwrapped_model'}"
    assert losses(train(store, tmp_path / "b", start))[0] < before[0] - 0.5


def test_eval_loss_has_the_same_masks_every_time(store, tmp_path):
    """With a learning rate of zero it does not move."""
    options = [f"dataset.eval_store={store}", "experiment.eval_every=4"]
    lines = train(store, tmp_path / "run", *options, "optimizer.params.learning_rate=0.0")
    found = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(found) == 3 and len(set(found)) == 1


def test_scale_lr_scales(store, tmp_path):
    lines = train(store, tmp_path / "run", "optimizer.params.scale_lr=true")
    peak = max(line["learning_rate"] for line in lines)
    assert peak == pytest.approx(3e-3 * 16 / 256)


def test_a_mixture_from_a_file_stopped_and_resumed(store, tmp_path):
    """Two stores with shares and a filter; a run in two parts equals one in one."""
    other = make_store(tmp_path / "other", rows=100, backend="zarr")
    (tmp_path / "mixture.yaml").write_text(
        f"dataset:\n  mixture:\n    - {{store: {store}, weight: 3, filter: class_id < 5}}\n"
        f"    - {{store: {other}, weight: 1}}\n"
    )
    argv = [f"config={tmp_path}/mixture.yaml", *SMALL, "lr_scheduler.scheduler=constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_to_end([*argv, f"experiment.output_dir={whole}"]) == 0
    for steps in (STEPS // 2, STEPS):
        options = [f"experiment.output_dir={parts}", f"training.max_train_steps={steps}"]
        assert run_to_end([*argv, *options]) == 0
    loader = json.loads((parts / f"checkpoint-{STEPS}" / "metadata.json").read_text())["loader"]
    assert loader["shares"] == [0.75, 0.25] and loader["store 0: filter"] == "class_id < 5"
    before, after = (load_file(run / "model" / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_store_or_a_mixture(store, tmp_path, capfd):
    argv = [f"experiment.output_dir={tmp_path}", *SMALL]
    assert "dataset.train_store=… is missing" in refused(argv, capfd)
    both = [*argv, f"dataset.train_store={store}", f"dataset.mixture=[{{store: {store}}}]"]
    with pytest.raises(SystemExit):
        train_main(both)
    assert "not both" in capfd.readouterr().err
    strange = [*argv, f"dataset.train_store={store}", "dataset.filter=clas_id > 3"]
    assert "there is class_id" in refused(strange, capfd)


def test_soft_targets_that_are_not_stored(store, tmp_path, capfd):
    argv = [f"dataset.train_store={store}", f"experiment.output_dir={tmp_path}/run", *SMALL]
    message = refused([*argv, "training.soft_targets=stored"], capfd)
    for words in ("has no topk_codes", "model.vq_model.topk", "soft_targets=recomputed"):
        assert words in message


@pytest.mark.parametrize(
    "word",
    [
        "experiment.max_train_examples=0", "generation.images_per_class=0",
        "generation.timesteps=0", "training.gradient_accumulation_steps=0",
        "lr_scheduler.params.warmup_steps=-5", "lr_scheduler.params.num_cycles=0",
        "optimizer.params.beta2=1.5", "optimizer.params.learning_rate=-1.0",
        "optimizer.params.weight_decay=-1.0", "training.ema.decay=2.0",
        "training.ema.update_every=0", "training.global_batch_size=0",
        "training.max_grad_norm=-1.0", "training.max_train_steps=0",
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused_by_name(capfd, word):
    with pytest.raises(SystemExit):
        train_main(["experiment.output_dir=nowhere", *SMALL, word])
    assert capfd.readouterr().err.startswith(f"error: {word}: legal are ")
