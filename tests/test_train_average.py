"""muse-train average: a mean of checkpoints is the mean, and a model that others open."""

import json

import pytest
import torch

from train_stage.average import average_weights, main
from train_stage.models.load_transformer import load_transformer
from train_stage.models.transformer import MaskGitTransformer
from train_stage.training.checkpoint import CODES

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three checkpoints with other weights each."""
    path = tmp_path_factory.mktemp("run")
    for step in (5, 10, 100):
        torch.manual_seed(step)
        folder = path / f"checkpoint-{step}" / "unwrapped_model"
        MaskGitTransformer(**SMALL, intermediate_size=32).save_pretrained(folder)
        (folder / CODES).write_text(json.dumps({"step": step}))
    return path


def weights_of(folder):
    return load_transformer(folder).state_dict()


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        ([], (1 / 3, 1 / 3, 1 / 3)),
        (["last=2"], (0, 1 / 2, 1 / 2)),
        (["decay=0.75"], (0.75**2, 0.25 * 0.75, 0.25)),
    ],
)
def test_the_average_of_checkpoints(run, tmp_path, words, shares):
    assert main([f"run={run}", f"output={tmp_path}/model", *words]) == 0
    made = weights_of(tmp_path / "model")
    parts = [weights_of(run / f"checkpoint-{step}" / "unwrapped_model") for step in (5, 10, 100)]
    for name, weight in made.items():
        expected = sum(share * part[name] for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(weight, expected)
    assert json.loads((tmp_path / "model" / CODES).read_text()) == {"step": 100}


def test_one_checkpoint_is_no_average(run, tmp_path, capsys):
    assert main([f"run={run}", f"output={tmp_path}/model", "last=1"]) == 2
    said = capsys.readouterr().err
    assert "an average needs 2" in said and "checkpoints_total_limit=null" in said


def test_a_moving_average_of_one_is_it():
    assert average_weights([{"a": torch.ones(2)}], decay=0.5)["a"].tolist() == [1, 1]
