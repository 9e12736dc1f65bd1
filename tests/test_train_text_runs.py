"""Runs with text: other stores beside, encoders of all kinds, dropout, learned texts, resuming."""

import json

import pytest
import torch
from test_train_conditioning import (
    UVIT,
    batch_of,
    encoders,  # noqa: F401
    make,
    nothing_dropped,
    run,
    store,  # noqa: F401
    texts,
)
from text_store import make_text_store

from train_stage.train import main as train

EVAL = ["experiment.eval_every=1"]


@pytest.fixture(scope="module")
def other_store(tmp_path_factory, encoders):  # noqa: F811
    """The same kinds of columns; without vectors of CLIP's projection."""
    folder = tmp_path_factory.mktemp("other-text-store")
    return make_text_store(folder, encoders, states=["clip", "bert"], rows=40)


@pytest.fixture(scope="module")
def twin(tmp_path_factory, encoders):  # noqa: F811
    folder = tmp_path_factory.mktemp("twin-text-store")
    return make_text_store(folder, encoders, states=["clip", "bert"], pooled=["clip"], rows=40)


def refused(capsys, *words):
    """What muse-train says when it refuses."""
    required = ["experiment.output_dir=/nowhere", "training.max_train_steps=1"]
    assert train([*required, "optimizer.params.learning_rate=1", *map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("words", [texts("bert"), [*texts("clip"), *UVIT]], ids=["plain", "uvit"])
def test_texts_are_validated_and_mixed(store, twin, tmp_path, words):  # noqa: F811
    mixture = f"dataset.mixture=[{{store: {store}, weight: 1}}, {{store: {twin}, weight: 2}}]"
    places = ["dataset.train_store=null", mixture, f"dataset.eval_store={twin}"]
    lines = run(store, tmp_path / "run", *places, *words, *EVAL, steps=2)
    assert lines[-1]["eval_loss"] > 0


def test_names_of_classes_are_validated(tmp_path, encoders):  # noqa: F811
    paths = [make_text_store(tmp_path / n, {}, rows=40, class_names=True) for n in ("a", "b")]
    words = [f"model.text_encoders.clip.pretrained={encoders['clip']}", "model.class_prompt=a {}"]
    lines = run(paths[0], tmp_path / "run", *words, f"dataset.eval_store={paths[1]}", *EVAL)
    assert lines[-1]["eval_loss"] > 0


def test_states_of_another_layer_are_not_mixed(store, other_store, capsys):  # noqa: F811
    both = f"dataset.mixture=[{{store: {store}}}, {{store: {other_store}}}]"
    said = refused(capsys, both, *texts("clip"))
    assert "cannot be mixed" in said and "'layer': 'last, normalized'" in said
    assert "no column 'text_pooled_clip'" in refused(capsys, both, *texts("clip"), *UVIT)


def test_where_no_projection_is_stored_the_mean_of_states_is_read(other_store, tmp_path):
    run(other_store, tmp_path / "run", *texts("clip"), *UVIT, steps=1)
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["cond_embed_dim"] == config["encoder_hidden_size"] == 16


def test_the_first_encoder_that_projects_gives_the_pooled_vector(store):  # noqa: F811
    given = []
    for words in (texts("t5") + texts("clip"), texts("clip"), texts("t5")):
        conditioner = make(store, words, has_micro=True)
        batch = batch_of(store, conditioner)
        given.append(conditioner(batch, nothing_dropped(batch))["cond_embeds"])
        prompt = conditioner.for_prompts(["a cat"])["cond_embeds"]
        assert prompt.shape[1] == given[-1].shape[1] == conditioner.encoder.widths[1]
    assert torch.equal(given[0], given[1]) and given[0].shape != given[2].shape


def test_text_encoders_that_are_not_there(store, tmp_path, capsys):  # noqa: F811
    words = [f"dataset.train_store={store}", f"model.text_encoders.bert.pretrained={tmp_path}/no"]
    said = refused(capsys, *words)
    assert "model.text_encoders.bert" in said and "bert.pretrained=" in said


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.transformer.num_classes=3", "num_classes=3, but the store has class ids up to 4"),
        ("model.transformer.null_text_length=4", "give model.null_condition=learned"),
    ],
)
def test_options_that_do_not_fit_texts(store, capsys, word, message):  # noqa: F811
    assert message in refused(capsys, f"dataset.train_store={store}", *texts("bert"), word)
