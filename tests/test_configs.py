"""The config loader's refusals, and every YAML of the repository loaded by its command's schema."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import MISSING, OmegaConf

from configs.load import (
    ConfigError,
    build_section,
    describe,
    dump_config,
    load_config,
    open_section,
)
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.vq_training.config import TrainVQConfig
from train_stage.config import TrainConfig
from train_stage.demo import DemoConfig
from train_stage.evaluate import EvaluateConfig
from train_stage.generate import GenerateConfig
from train_stage.models.config import CONFIGS

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    "tokenize": TokenizeConfig,
    "train": TrainConfig,
    "train_vq": TrainVQConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "demo": DemoConfig,
}


@dataclass
class Inner:
    hidden_size: int = 8
    """How wide."""


@dataclass
class Outer:
    path: str = MISSING
    """Where."""
    mode: Literal["fast", "slow"] = "fast"
    """How."""
    model: Inner = field(default_factory=Inner)
    open: dict[str, Any] = open_section(Inner)


def test_help_has_the_sentences_of_inherited_options():
    @dataclass
    class Wider(Inner):
        depth: int = 2
        """How deep."""

    text = describe(Wider)
    assert "How wide." in text and "How deep." in text


def test_command_line_beats_yaml_beats_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("path: x\nmodel: {hidden_size: 16}\n")
    config = load_config(Outer, [f"config={tmp_path / 'a.yaml'}", "mode=slow"])
    assert (config.path, config.mode, config.model.hidden_size) == ("x", "slow", 16)
    config = load_config(Outer, [f"config={tmp_path / 'a.yaml'}", "model.hidden_size=32"])
    assert config.model.hidden_size == 32


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["path=x", "model.hiden_size=3"], ["model.hiden_size", "model.hidden_size"]),
        (["path=x", "open.hiden_size=3"], ["open.hiden_size", "open.hidden_size"]),
        (["path=[x,y # z]"], ["path=[x,y # z]", "lists are"]),
        (["path=x", "modell.hidden_size=3"], ["modell", "did you mean model?"]),
        (["path=x", "model.hidden_size=wide"], ["model.hidden_size", "wide"]),
        (["path=x", "open.hidden_size=wide"], ["open.hidden_size", "wide"]),
        (["path=x", "mode=quick"], ["mode", "quick", "fast", "slow"]),
        (["mode=slow"], ["path", "must be given"]),
        (["path=x", "config=nothing.yaml"], ["nothing.yaml", "does not exist"]),
        (["path=x", "fast"], ["fast", "key=value"]),
    ],
)
def test_mistakes_are_named(argv, words):
    with pytest.raises(ConfigError) as error:
        load_config(Outer, argv)
    for word in words:
        assert word in str(error.value)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        load_config(Outer, ["--help"])
    text = capsys.readouterr().out
    assert "model.hidden_size=8" in text and "How wide." in text and "path=???" in text


def test_a_missing_file_names_those_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_config(Outer, ["config=configs/train/no.yaml"])
    assert "configs/train/imagenet.yaml" in str(error.value)
    assert "configs/tokenize" not in str(error.value)


def test_help_into_a_reader_that_leaves():
    code = "from configs.load import *; from train_stage.config import *; "
    code += "load_command_config(TrainConfig, ['--help'], '')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


def test_dump_loads_again(tmp_path):
    config = load_config(Outer, ["path=x", "open.hidden_size=9"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(Outer, [f"config={tmp_path / 'config.yaml'}"]) == config


def test_every_yaml_belongs_to_a_command():
    folders = {path.parent.name for path in (ROOT / "configs").rglob("*.yaml")}
    assert folders <= set(SCHEMAS)


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "configs").rglob("*.yaml")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_every_yaml_loads(path):
    """With its required keys filled in, every recipe builds its whole configuration."""
    schema = SCHEMAS[path.parent.name]
    merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
    filled = [f"{key}=1" for key in OmegaConf.missing_keys(merged)]
    config = load_config(schema, [f"config={path}", *filled])
    if schema is TrainConfig:
        fields = CONFIGS[config.model.architecture]
        build_section(fields, config.model.transformer_given(), "model.transformer")


def test_docstrings_of_all_options():
    from configs.load import _walk

    for schema in SCHEMAS.values():
        for key, _, _, words in _walk(schema):
            assert words, f"{schema.__name__}: {key} has no sentence"


@pytest.mark.parametrize("words", [["training.mixed_precision=no"], ["config={}"]])
def test_a_no_without_quotes_is_a_word_where_it_is_legal(tmp_path, words):
    (tmp_path / "own.yaml").write_text("training:\n  mixed_precision: no\n  use_ema: no\n")
    words = [word.format(tmp_path / "own.yaml") for word in words]
    given = ["experiment.output_dir=x", "training.max_train_steps=1"]
    config = load_config(TrainConfig, [*words, *given, "optimizer.params.learning_rate=1"])
    assert config.training.mixed_precision == "no" and config.training.use_ema is False
