"""The model directory: round trips, the published file names, and what is refused."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from storage.pretrained import PretrainedModel, model_fingerprint


@dataclass
class ToyConfig:
    width: int = 4
    levels: tuple[int, ...] = (1, 2)


class Toy(PretrainedModel):
    config_class = ToyConfig

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        self.linear = nn.Linear(self.config.width, 2)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Toy(width=3)
    model.save_pretrained(tmp_path / "toy")
    return model, tmp_path / "toy"


def test_round_trip(saved):
    model, path = saved
    loaded = Toy.from_pretrained(path)
    assert not loaded.training and loaded.config == ToyConfig(3, (1, 2))
    assert torch.equal(loaded.linear.weight, model.linear.weight)
    assert model_fingerprint(loaded) == model_fingerprint(model)
    config = json.loads((path / "config.json").read_text())
    assert config == {"_class_name": "Toy", "_version": "0.0.1", "levels": [1, 2], "width": 3}


def test_fingerprint_sees_one_bit_and_the_config(saved):
    model, _ = saved
    before = model_fingerprint(model)
    with torch.no_grad():
        model.linear.bias[0] += 1e-7
    assert model_fingerprint(model) != before
    assert model_fingerprint(Toy(width=3)) != before


def test_published_file_name_and_extra_keys(saved):
    model, path = saved
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    config = json.loads((path / "config.json").read_text())
    config |= {"decay": 0.9999, "_name_or_path": "x", "old_option": 3}
    (path / "config.json").write_text(json.dumps(config))
    assert torch.equal(Toy.from_pretrained(path).linear.weight, model.linear.weight)


class Evil:
    def __reduce__(self):
        return (print, ("code in a checkpoint ran",))


def test_code_in_a_checkpoint_never_runs(saved, capsys):
    _, path = saved
    (path / "model.safetensors").unlink()
    torch.save({"linear.weight": Evil()}, path / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        Toy.from_pretrained(path)
    assert "ran" not in capsys.readouterr().out


def test_subfolder_and_hub_cache(saved, monkeypatch):
    """A repository in the hub's cache is found by its hub name, without a network."""
    model, path = saved
    loaded = Toy.from_pretrained(path.parent, subfolder="toy")
    assert torch.equal(loaded.linear.weight, model.linear.weight)
    commit = "0" * 40
    repo = path.parent / "hub" / "models--openMUSE--toy"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    path.rename(repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(path.parent / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = Toy.from_pretrained("openMUSE/toy")
    assert torch.equal(loaded.linear.weight, model.linear.weight)


def test_strict_loading_lists_every_key(saved):
    model, path = saved
    (path / "model.safetensors").unlink()
    state = {"linear.weight": torch.zeros(2, 9), "linear.extra": torch.zeros(1)}
    torch.save(state, path / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        Toy.from_pretrained(path)
    text = str(error.value)
    assert "missing linear.bias" in text and "unknown linear.extra" in text
    assert "linear.weight has shape (2, 9), the model (2, 3)" in text


def test_unknown_keyword_and_unknown_place(tmp_path):
    with pytest.raises(TypeError, match="widht.*width"):
        Toy(widht=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json"):
        Toy.from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        Toy.from_pretrained(str(tmp_path / "not" / "here" / "at" / "all"))
