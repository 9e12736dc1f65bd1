"""The whole way by the public commands: drawn images -> tokenizer -> store -> model -> PNGs."""

import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw
from store_factory import SIZES, make_store

from storage.cli import main as store_command
from storage.reader import TokenStore
from tokenize_stage.encode import main as tokenize
from tokenize_stage.train_vq import main as train_vq
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from train_stage.evaluate import main as evaluate
from train_stage.generate import main as generate
from train_stage.train import main as train


def draw_images(folder, count, seed):
    """Two classes anyone can tell apart: a disc and a square, of any size, place and colour."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        name = ("disc", "square")[index % 2]
        image = Image.new("RGB", (20, 16), "white")
        left, top, side = *rng.integers(0, 6, 2), rng.integers(6, 10)
        box = [int(left), int(top), int(left + side), int(top + side)]
        pen = ImageDraw.Draw(image)
        shape = pen.ellipse if name == "disc" else pen.rectangle
        shape(box, fill=tuple(rng.integers(0, 200, 3).tolist()))
        path = folder / name / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


@pytest.mark.slow
def test_images_to_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "photos", 200, seed=0)
    draw_images(tmp_path / "test", 60, seed=1)
    (tmp_path / "photos" / "disc" / "broken.jpg").write_bytes(b"no image")
    model = ["resolution=16", "channel_mult=[1,1]", "hidden_channels=32", "num_res_blocks=1"]
    model += ["z_channels=8", "quantized_embed_dim=8", "num_embeddings=32"]
    assert 0 == train_vq(
        ["dataset.shards_path_or_url=photos", "experiment.output_dir=vq",
         "dataset.held_out_images=20", "training.max_train_steps=30", "training.batch_size=16",
         "codebook.init_step=10", *(f"model.{word}" for word in model)]
    )  # fmt: skip
    assert 0 == tokenize(
        ["dataset.shards_path_or_url=photos", "store.path=store", "dataset.images_per_shard=64",
         "model.vq_model.pretrained=vq/model", "dataset.preprocessing.resolution=16"]
    )  # fmt: skip
    assert 0 == store_command(["verify", "store"])
    store = TokenStore("store")
    assert len(store) == 200 and len(store.skipped()) == 1
    assert store.meta.transform["class_names"] == ["disc", "square"]
    sizes = [
        "hidden_size=32",
        "num_attention_heads=2",
        "num_hidden_layers=2",
        "intermediate_size=64",
    ]
    assert 0 == train(
        ["dataset.train_store=store", "experiment.output_dir=run", "training.max_train_steps=30",
         "training.batch_size=32", "experiment.log_every=10", "experiment.generate_every=30",
         "optimizer.params.learning_rate=3e-3", "lr_scheduler.params.warmup_steps=5",
         *(f"model.transformer.{word}" for word in sizes)]
    )  # fmt: skip
    losses = [json.loads(line)["loss"] for line in open("run/metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert generate(["model=run/model", "output_dir=out", "images_per_class=6"]) == 0
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 12
    grid = np.asarray(Image.open("out/grid.png"))
    assert grid.std() > 5  # not a blank sheet
    assert Image.open("run/samples/step-00000030.png").size[0] > 100
    (tmp_path / "photos" / "disc" / "broken.jpg").unlink()
    judge = ["generated=out", "train=photos", "test=test", "vq_model=vq/model", "epochs=1"]
    assert evaluate([*judge, "output_dir=judged"]) == 0
    results = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert 0 <= results["generated_accuracy"] <= 1 and results["psnr"] > 5


def test_a_model_is_only_decoded_by_its_own_tokenizer(tmp_path, capsys):
    store = make_store(tmp_path)
    MaskGitVQGAN(**SIZES).save_pretrained(tmp_path / "other")
    run = [
        "training.max_train_steps=1",
        "training.batch_size=8",
        "model.transformer.hidden_size=24",
    ]
    run += [f"dataset.train_store={store}", f"experiment.output_dir={tmp_path / 'run'}"]
    assert train([*run, "optimizer.params.learning_rate=1e-3"]) == 0
    out = [f"model={tmp_path / 'run/model'}", f"output_dir={tmp_path / 'out'}"]
    assert generate([*out, f"vq_model={tmp_path / 'other'}"]) == 2
    assert re.search("the codes were made by .*vq_model=", capsys.readouterr().err)
    assert generate([*out, "class_ids=12"]) == 2
    assert "class_ids=12: the model has classes 0..9" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday.png").write_bytes(b"x")
    assert generate([*out, "images_per_class=1"]) == 2
    assert "holds other files" in capsys.readouterr().err
    out[0] = f"model={tmp_path / 'run/checkpoint-1/unwrapped_model'}"
    out[1] = f"output_dir={tmp_path / 'new'}"
    assert generate([*out, "images_per_class=2", "class_ids=0-1"]) == 0
    assert generate([*out, "images_per_class=1", "class_ids=0-1"]) == 0
    assert len(list((tmp_path / "new").glob("*/*.png"))) == 2  # the earlier ones are gone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.transformer.codebook_size=1024"], "codebook_size=1024, but the store .* has 60"),
        (["model.transformer.num_classes=5"], "num_classes=5, but the store has class ids up to 9"),
        (["model.transformer.add_cross_attention=true"], "add_cross_attention"),
        (["mask_schedule.schedule=cosin"], "mask schedule 'cosin'"),
        (["mask_schedule.schedule=sigmoid", "mask_schedule.params.taw=2"], "taw"),
        (["dataset.codes_column=cods"], r"codes_column=cods: the store has \['codes'\]"),
        (["training.mixed_precision=fp16"], "fp16 needs a GPU"),
        (["training.global_batch_size=10", "training.gradient_accumulation_steps=4"], "8 and 12"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys, words, message):
    run = [f"dataset.train_store={make_store(tmp_path)}", f"experiment.output_dir={tmp_path}/run"]
    run += ["training.max_train_steps=1", "optimizer.params.learning_rate=1e-3"]
    assert train([*run, *words]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "word",
    [
        "experiment.log_every=0",
        "training.batch_size=0",
        "training.label_smoothing=5",
        "training.cond_dropout_prob=10",
    ],
)
def test_values_out_of_range_are_refused(capsys, word):
    with pytest.raises(SystemExit) as error:
        run = ["dataset.train_store=x", "experiment.output_dir=y", "training.max_train_steps=1"]
        train([*run, "optimizer.params.learning_rate=1", word])
    assert error.value.code == 2 and word in capsys.readouterr().err
