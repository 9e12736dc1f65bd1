"""Pictures drawn during training: which prompts, of what size, and that later ones are the same."""

import pytest
import torch
from PIL import Image
from test_train_conditioning import TINY, UVIT, run, texts
from text_factory import make_bert, make_clip
from text_store import CAPTION, SUBJECTS, make_text_store

from configs.load import load_config
from storage.reader import TokenStore
from train_stage import pictures
from train_stage.config import TrainConfig
from train_stage.pipeline.muse_pipeline import MusePipeline
from train_stage.training.samples import first_prompts

DRAWN = ["generation.timesteps=3", "generation.images_per_class=2", "generation.guidance_scale=2"]
PROMPTS = ["a photo of the cat", "a red moon", "", "the sea at night"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    encoders = {"clip": make_clip(folder / "clip"), "bert": make_bert(folder / "bert")}
    return make_text_store(folder / "made", encoders, states=["clip", "bert"], pooled=["clip"])


@pytest.mark.parametrize(
    "words",
    [
        [*texts("clip", source="ids"), *UVIT],
        [*texts("clip", source="states"), *UVIT, "model.aesthetic_score=2"],
        [*texts("clip", source="ids"), *UVIT, "model.null_condition=learned"],
        [*texts("bert"), *texts("clip", source="ids")],
        [*texts("bert", source="ids"), "model.null_condition=learned"],
    ],
)
def test_a_pipeline_of_the_model_draws_what_training_drew(store, tmp_path, words):
    """The same prompts and the same empty text, from what lies beside the weights alone."""
    folder, own = tmp_path / "run", tmp_path / "own.png"
    prompts = [f"generation.prompts={PROMPTS}", "experiment.generate_every=1"]
    run(store, folder, *words, *DRAWN, *prompts, "optimizer.params.learning_rate=0.1", steps=2)
    pipe = MusePipeline.from_pretrained(folder / "model", device="cpu")
    how = {"num_inference_steps": 3, "temperature": 1.0, "num_images_per_prompt": 2}
    seeded = {"generator": torch.Generator().manual_seed(42), "output_type": "uint8"}
    made = pipe(PROMPTS, guidance_scale=2.0, **how, **seeded)
    assert made.shape == (8, 3, 8, 8)
    pictures.save_grid(made, own, 2, PROMPTS)
    written = [folder / f"samples/step-{step:08d}.png" for step in (1, 2)]
    assert own.read_bytes() == written[1].read_bytes() != written[0].read_bytes()


def test_without_prompts_captions_of_the_store_are_drawn_alike(store, tmp_path):
    config = load_config(
        TrainConfig,
        ["experiment.output_dir=x", "training.max_train_steps=1", *TINY, *texts("bert")]
        + ["optimizer.params.learning_rate=1"],
    )
    prompts = first_prompts(config, TokenStore(store))
    assert sorted(prompts) == sorted(CAPTION.format(subject) for subject in SUBJECTS)
    words = ["experiment.generate_every=1", "training.use_ema=false", "generation.classes=3"]
    run(store, tmp_path, *texts("bert"), *DRAWN, *words, "optimizer.params.learning_rate=0")
    written = sorted((tmp_path / "samples").glob("*.png"))
    assert len(written) == 4 and len({path.read_bytes() for path in written}) == 1
    pictures.save_grid(
        torch.zeros(6, 3, 8, 8, dtype=torch.uint8), tmp_path / "3.png", 2, prompts[:3]
    )
    assert Image.open(written[0]).height == Image.open(tmp_path / "3.png").height
