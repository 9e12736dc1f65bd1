"""muse-train-vq: what it writes, that it learns, and that an interrupted run ends the same."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from configs.load import load_config
from tokenize_stage import train_vq
from tokenize_stage.process import EXIT_REFUSED, EXIT_STOPPED
from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq_training.codebook import cluster, perplexity, revive
from tokenize_stage.vq_training.config import TrainVQConfig
from tokenize_stage.vq_training.evaluate import evaluate
from tokenize_stage.vq_training.images import batch_rows, load_images, random_flip
from tokenize_stage.vq_training.trainer import VQTrainer

STEPS = 24
OPTIONS = (
    """
model.resolution=16 model.hidden_channels=32 model.channel_mult=[1,1] model.num_res_blocks=1
model.z_channels=4 model.quantized_embed_dim=4 model.num_embeddings=16 model.dropout=0.1
training.batch_size=8 training.device=cpu dataset.held_out_images=9 dataset.random_flip=true
codebook.init_step=6 codebook.revive_every=4 lr_scheduler.params.warmup_steps=4
experiment.log_every=5 experiment.eval_every=12 experiment.save_every=7
""".split()
    + [f"training.max_train_steps={STEPS}"]
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 drawn pictures of discs, and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(60):
        image = Image.new("RGB", (20, 20), tuple(rng.integers(0, 256, 3).tolist()))
        x, y, radius = (int(n) for n in rng.integers(3, 14, 3))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), colour)
        image.save(folder / f"{index:03d}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    (folder / "notes.txt").write_text("not an image")
    return folder


def arguments(photos, run):
    return [*OPTIONS, f"dataset.shards_path_or_url={photos}", f"experiment.output_dir={run}"]


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A run directory that was never interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    assert train_vq.main(arguments(photos, run)) == 0
    return run


def metrics_of(run):
    """The lines of metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def assert_same_result(run, other):
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (other / weights).read_bytes()
    assert metrics_of(run) == metrics_of(other)
    assert (run / "reconstructions.png").read_bytes() == (
        other / "reconstructions.png"
    ).read_bytes()


def test_writes_model_metrics_and_picture(finished, photos):
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoint.pt",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "reconstructions.png",
    ]
    vq = load_vq_model(finished / "model")
    held_out = load_images(str(photos), 16, 100, 9, seed=0).held_out
    measured = evaluate(vq, held_out, 4, torch.device("cpu"))
    lines = metrics_of(finished)
    last = [line for line in lines if line["split"] == "held_out"][-1]
    assert last["step"] == STEPS and last["psnr"] == pytest.approx(measured["psnr"], abs=1e-4)
    assert [line["step"] for line in lines if line["split"] == "train"] == [5, 10, 15, 20, 24]
    with Image.open(finished / "reconstructions.png") as picture:
        assert picture.size == (9 * 16, 2 * 16)
        originals = np.asarray(picture)[:16]
    assert np.array_equal(originals, np.concatenate(held_out.transpose(0, 2, 3, 1), axis=1))


def test_learns_and_uses_its_codebook(finished):
    train = [line for line in metrics_of(finished) if line["split"] == "train"]
    assert train[-1]["psnr"] > train[0]["psnr"] + 3
    assert train[-1]["codes_used"] >= 12 and train[-1]["perplexity"] > 6
    assert train[0]["codes_used"] == 0 and train[0]["quantizer"] == 0  # before codebook.init_step


@pytest.mark.parametrize("stop_step", [3, 6, 15])
def test_a_stopped_run_that_is_started_again_ends_the_same(
    finished, photos, tmp_path, monkeypatch, stop_step
):
    step_once = train_vq.VQTrainer.train_step

    def step_and_signal(trainer):
        step_once(trainer)
        if trainer.step == stop_step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_vq.VQTrainer, "train_step", step_and_signal)
        assert train_vq.main(arguments(photos, tmp_path)) == EXIT_STOPPED
    assert not (tmp_path / "model").exists()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["trainer"]["step"] == stop_step
    assert train_vq.main(arguments(photos, tmp_path)) == 0
    assert_same_result(tmp_path, finished)


def test_a_killed_run_that_is_started_again_ends_the_same(finished, photos, tmp_path):
    command = [sys.executable, "-m", "tokenize_stage.train_vq", *arguments(photos, tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 23, "split": "train"}\n{"step": 24, "spl')  # a later line, half a line
    assert train_vq.main(arguments(photos, tmp_path)) == 0
    assert_same_result(tmp_path, finished)


def test_a_finished_run_started_again_changes_nothing(finished, photos, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert train_vq.main(arguments(photos, finished)) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert "wrote" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_refused_by_key(finished, photos, capsys):
    other = [*arguments(photos, finished), "optimizer.params.learning_rate=0.5"]
    assert train_vq.main(other) == EXIT_REFUSED
    assert "optimizer.params {" in capsys.readouterr().err
    fewer = [*arguments(photos, finished), "dataset.max_images=50"]
    assert train_vq.main(fewer) == EXIT_REFUSED
    assert "dataset.max_images 100000 -> 50" in capsys.readouterr().err


@pytest.mark.parametrize("due", ["log_every", "save_every", "eval_every"])
def test_diverged_training_says_so_and_saves_nothing_of_it(photos, tmp_path, capsys, due):
    words = [f"experiment.{name}=1000" for name in ("log_every", "save_every", "eval_every")]
    words += [f"experiment.{due}=1", "optimizer.params.learning_rate=1e30"]
    assert train_vq.main([*arguments(photos, tmp_path), *words]) == EXIT_REFUSED
    last = capsys.readouterr().err.splitlines()[-1]
    step = 1 if due == "eval_every" else 2  # weights of 1e30 are finite, what they give is not
    assert last.startswith(f"error: training has diverged at step {step}: ")
    assert "lower optimizer.params.learning_rate (now 1e+30)" in last
    assert not (tmp_path / "model").exists()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "checkpoint.pt").exists() == (due == "save_every")
    if due == "save_every":  # of the first step, after which all was finite still
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainer"]
        assert saved["step"] == 1
        assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize("place", ["weight", "moment", "loss"])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(photos, tmp_path, place):
    config = load_config(TrainVQConfig, arguments(photos, tmp_path))
    trainer = VQTrainer(config, np.zeros((8, 3, 16, 16), np.uint8), torch.device("cpu"))
    trainer.train_step()
    trainer.check_finite()
    weight = next(trainer.model.parameters())
    moment = trainer.optimizer.state[weight]["exp_avg"]
    spoilt = {"weight": weight.data, "moment": moment, "loss": trainer.totals}[place]
    spoilt.view(-1)[-1] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 1"):
        trainer.check_finite()


def test_what_is_no_image_is_counted(photos):
    images = load_images(str(photos), 16, 100, 10, seed=0)
    assert images.train.shape == (50, 3, 16, 16) and images.train.dtype == np.uint8
    assert images.held_out.shape == (10, 3, 16, 16)
    assert sum(images.left_out.values()) == 2
    first = load_images(str(photos), 16, 20, 10, seed=0)
    assert len(first.train) + len(first.held_out) == 20
    with pytest.raises(ValueError, match="held_out_images=60"):
        load_images(str(photos), 16, 100, 60, seed=0)


def test_batches_cover_every_image_once_an_epoch():
    rows = np.concatenate([batch_rows(step, 8, 50, seed=0) for step in range(25)])  # 4 epochs
    for epoch in rows.reshape(4, 50):
        assert np.array_equal(np.sort(epoch), np.arange(50))
    assert not np.array_equal(rows[:50], rows[50:100])
    assert np.array_equal(batch_rows(7, 8, 50, seed=0), rows[56:64])
    assert not np.array_equal(batch_rows(7, 8, 50, seed=1), rows[56:64])


def test_random_flip_mirrors_half():
    images = np.arange(2000 * 3 * 2 * 2, dtype=np.uint32).reshape(2000, 3, 2, 2)
    flipped = random_flip(images, step=3, seed=0)
    is_same = (flipped == images).all(axis=(1, 2, 3))
    is_mirrored = (flipped == images[..., ::-1]).all(axis=(1, 2, 3))
    assert (is_same ^ is_mirrored).all() and 900 < is_mirrored.sum() < 1100
    assert np.array_equal(flipped, random_flip(images, step=3, seed=0))


def test_cluster_finds_clusters_and_wastes_no_code():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(12, 3, generator=generator)
    members = torch.arange(12).repeat_interleave(100)
    vectors = centres[members] + 0.01 * torch.randn(1200, 3, generator=generator)
    found = cluster(vectors, 24, np.random.default_rng(0), rounds=20)
    assert torch.cdist(centres, found).min(dim=1).values.max() < 0.05
    same = torch.zeros(500, 3)
    same[:4] = torch.eye(4, 3)
    assert len(torch.unique(cluster(same, 4, np.random.default_rng(0)), dim=0)) == 4


def test_revive_moves_only_unused_codes_onto_badly_served_vectors():
    codebook = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [1.0, 1.0]])
    before = codebook.clone()
    vectors = torch.cat([torch.zeros(1000, 2), torch.tensor([[9.0, 9.0], [-9.0, -9.0]])])
    used = torch.tensor([True, False, False, True])
    moved = revive(codebook, used, vectors, np.random.default_rng(0))
    assert moved.tolist() == [1, 2]
    assert torch.equal(codebook[used], before[used])
    assert sorted(codebook[moved].tolist()) == [[-9.0, -9.0], [9.0, 9.0]]
    assert len(revive(codebook, torch.zeros(4).bool(), vectors[:1], np.random.default_rng(0))) == 1


def test_perplexity_counts_the_codes_in_effective_use():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0])) == pytest.approx(1)
    assert perplexity(torch.tensor([3, 1])) == pytest.approx(1.7548, abs=1e-4)


@pytest.mark.parametrize(
    "word, message",
    [
        ("codebook.init_step=24", "codebook.init_step=24"),
        ("training.batch_size=0", "training.batch_size=0"),
        ("model.z_channels=8", "z_channels 8"),
        ("training.mixed_precision=fp8", "mixed_precision"),
    ],
)
def test_impossible_options_are_refused_by_name(photos, tmp_path, capsys, word, message):
    with pytest.raises(SystemExit) as exit:
        train_vq.main([*arguments(photos, tmp_path), word])
    assert exit.value.code == EXIT_REFUSED and message in capsys.readouterr().err


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    assert train_vq.main(arguments(tmp_path / "nothing", tmp_path / "run")) == EXIT_REFUSED
    assert "nothing" in capsys.readouterr().err
