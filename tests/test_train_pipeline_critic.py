"""The critic of a model, asked for through MusePipeline and muse-generate."""

import json

import pytest
import torch
from pipeline_factory import SMALL_TRANSFORMER, make_class_pipeline, randomized

from train_stage.generate import main as muse_generate
from train_stage.models.transformer import MaskGitTransformer
from train_stage.pipeline.muse_pipeline import MusePipeline
from train_stage.sampling.generation import generate


@pytest.fixture
def pipe():
    transformer = MaskGitTransformer(**SMALL_TRANSFORMER, num_classes=3, critic_head=True)
    return MusePipeline(make_class_pipeline().vae, randomized(transformer))


def seeded():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("critic", [None, "self"])
def test_the_pipeline_draws_what_generate_draws(pipe, critic):
    how = {"guidance_scale": 2.0, "temperature": 0.5, "critic": critic}
    ids = torch.tensor([0, 2])
    drawn = pipe(
        class_ids=ids, num_inference_steps=4, output_type="codes", generator=seeded(), **how
    )
    codes = generate(pipe.transformer, class_ids=ids, timesteps=4, generator=seeded(), **how)
    assert torch.equal(drawn.flatten(1), codes)
    other = {**how, "critic": None if critic else "self"}
    codes = generate(pipe.transformer, class_ids=ids, timesteps=4, generator=seeded(), **other)
    assert not torch.equal(drawn.flatten(1), codes)


def test_the_command_asks_it_and_says_where_there_is_none(pipe, tmp_path, capsys):
    make_class_pipeline().save_pretrained(tmp_path / "without")
    pipe.save_pretrained(tmp_path / "with")
    words = ["class_ids=1", "images_per_class=2", "timesteps=3", "device=cpu", "critic=self"]
    words += [f"output_dir={tmp_path / 'out'}"]
    assert muse_generate([f"model={tmp_path / 'with'}", *words]) == 0
    assert json.loads((tmp_path / "out/generate.json").read_text())["critic"] == "self"
    assert muse_generate([f"model={tmp_path / 'without'}", *words]) == 2
    assert "has no critic_head" in capsys.readouterr().err
