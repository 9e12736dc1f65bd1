"""Runs with text: other stores beside, encoders of all kinds, dropout, learned texts, resuming."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import SIZES
from test_train_conditioning import (
    TINY,
    UVIT,
    batch_of,
    encoders,  # noqa: F401
    make,
    nothing_dropped,
    run,
    store,  # noqa: F401
    texts,
)
from test_train_objective import COSINE
from text_store import make_text_store

from storage.reader import TokenStore
from train_stage.generate import main as generate
from train_stage.loading.loader import Source, TokenLoader
from train_stage.loading.store_stream import Reading
from train_stage.models.transformer import MaskGitTransformer
from train_stage.objective.loss import MaskedLoss
from train_stage.objective.masked_batch import mask_batch
from train_stage.train import main as train
from train_stage.training.config import TrainingConfig

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
    required = [*TINY, "experiment.output_dir=/nowhere", "training.max_train_steps=1"]
    assert train([*required, "optimizer.params.learning_rate=1", *map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("words", [texts("bert"), [*texts("clip"), *UVIT]], ids=["plain", "uvit"])
def test_texts_are_validated_and_mixed(store, twin, tmp_path, words):  # noqa: F811
    mixture = f"dataset.mixture=[{{store: {store}, weight: 1}}, {{store: {twin}, weight: 2}}]"
    places = ["dataset.train_store=null", mixture, f"dataset.eval_store={twin}"]
    lines = run(store, tmp_path / "run", *places, *words, *EVAL, steps=2)
    assert lines[-1]["eval_loss"] > 0


def test_stores_with_and_without_scores_are_mixed(store, encoders, tmp_path):  # noqa: F811
    """Rows of the second are told the score of those whose score is not known."""
    blank = make_text_store(tmp_path / "blank", {"clip": encoders["clip"]}, scores=False)
    words = [*texts("clip", source="ids"), "model.aesthetic_score=5.5"]
    conditioner = make(store, words, has_micro=True)
    for reading in (Reading(), Reading(shuffle="window")):
        sources = [Source(TokenStore(path)) for path in (store, blank)]
        loader = TokenLoader(sources, 64, columns=conditioner.columns, reading=reading)
        batch = loader.batch(0)
        score = conditioner(batch, nothing_dropped(batch))["micro_conds"][:, 4].numpy()
        known = (batch.sources == 0) & (batch.rows % 8 != 0)
        np.testing.assert_allclose(score, np.where(known, 4 + batch.rows / 200, 5.5), rtol=1e-6)
        assert 0 < (batch.sources == 0).sum() < 64
    alone = make(blank, words, has_micro=True)
    batch = batch_of(blank, alone)
    assert (alone(batch, nothing_dropped(batch))["micro_conds"][:, 4] == 5.5).all()


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


def text_model(width=20, **fields):
    torch.manual_seed(0)
    text = {"add_cross_attention": True, "encoder_hidden_size": width}
    return MaskGitTransformer(**SIZES, codebook_size=60, num_vq_tokens=16, **text, **fields)


def masked_rows(store, conditioner, rows=200, rank=0, world=1, **options):  # noqa: F811
    """mask_batch of this process's part of the first global batch."""
    columns = conditioner.columns
    loader = TokenLoader(TokenStore(store), rows, 1, rank, world, columns=columns)
    config, model = TrainingConfig(max_train_steps=1, **options), text_model()
    device = conditioner.device
    return mask_batch(
        loader.batch(0), model, config, 7, COSINE, rank, world, device, conditioner, (4, 4)
    )


@pytest.mark.parametrize("null", ["empty", "learned"])
def test_nine_in_ten_texts_are_kept(store, null):  # noqa: F811
    """At cond_dropout_prob=0.1; counted where a model gets it. The reference keeps one in ten."""
    conditioner = make(store, [*texts("bert"), f"model.null_condition={null}"])
    given = masked_rows(store, conditioner, rows=8000).by_row
    if null == "learned":
        dropped = given["dropped"]
    else:  # rows without a caption have the same text, but zeros where it is padded
        empty = conditioner.absent()["negative_embeds"]
        dropped = (given["encoder_hidden_states"] == empty).flatten(1).all(1)
    assert (~dropped).float().mean() == pytest.approx(0.9, abs=0.01)
    parts = [masked_rows(store, conditioner, 8000, rank, 4).by_row for rank in range(4)]
    for name, values in given.items():  # the same rows, whatever the processes
        assert torch.equal(torch.cat([part[name] for part in parts]), values)


@pytest.mark.parametrize("words", [texts("clip", source="ids") + texts("t5"), texts("bert")])
def test_a_step_with_text_asks_the_device_for_nothing(store, words):  # noqa: F811
    """See test_train_objective. (On a BERT's ids transformers itself does, once.)"""
    conditioner = make(store, words)
    meta = conditioner.device = torch.device("meta")
    conditioner.empty = type(conditioner.empty)(
        *(None if x is None else x.to(meta) for x in conditioner.empty)
    )
    conditioner.encoder.to(meta)
    masked = masked_rows(store, conditioner, rows=16, log_entropy_every=1)
    width = masked.by_row["encoder_hidden_states"].shape[-1]
    for part in masked.split(2):
        out = MaskedLoss(text_model(width).to(meta))(**part)
        (out["total"] / masked.denominator).backward()


@pytest.mark.parametrize("null", ["empty", "learned"])
def test_interrupted_and_in_several_passes(store, tmp_path, null):  # noqa: F811
    """Going on is the same bit for bit, two passes are to rounding."""
    words = [*texts("clip", source="ids"), *texts("bert"), f"model.null_condition={null}"]
    words += ["training.cond_dropout_prob=0.3", "model.transformer.hidden_dropout=0"]
    words += ["model.transformer.attention_dropout=0", "training.gradient_accumulation_steps="]
    one, two = [[*words[:-1], words[-1] + passes] for passes in ("1", "2")]
    whole = run(store, tmp_path / "whole", *one)
    saving = "experiment.save_every=1"
    run(store, tmp_path / "parts", *one, saving, steps=2)
    resumed = run(store, tmp_path / "parts", *one, saving)
    halves = run(store, tmp_path / "halves", *two, "training.batch_size=8")
    losses = [[line["loss"] for line in lines] for lines in (whole, resumed, halves)]
    assert losses[0] == losses[1] and losses[2] == pytest.approx(losses[0], rel=1e-6)
    weights = [
        load_file(tmp_path / name / "model/model.safetensors")
        for name in ("whole", "parts", "halves")
    ]
    for name, wanted in weights[0].items():
        assert torch.equal(weights[1][name], wanted)
        torch.testing.assert_close(weights[2][name], wanted, rtol=0, atol=1e-6)
    assert ("null_text" in weights[0]) == (null == "learned")
    records = [
        json.loads((tmp_path / name / "codes.json").read_text())["condition"]
        for name in ("whole/model", "parts/checkpoint-4/unwrapped_model")
    ]
    assert records[0] == records[1]


def test_a_learned_text_is_what_guidance_leads_away_from(store, tmp_path):  # noqa: F811
    """Trained, saved, opened again: another one gives other pictures, and so does none."""
    words = [*texts("bert"), "model.null_condition=learned", "training.cond_dropout_prob=0.5"]
    words += ["model.gradient_checkpointing=true"]
    run(store, tmp_path / "run", *words, steps=8)
    model = tmp_path / "run/model"
    drawn = []
    for changed in (False, True):
        opened = MaskGitTransformer.from_pretrained(model)
        if changed:
            opened.null_text.data.mul_(-50)
            opened.save_pretrained(model)
        argv = [f"model={model}", f"output_dir={tmp_path / str(changed)}", "timesteps=3"]
        assert generate([*argv, "prompts=[a photo of the cat]", "guidance_scale=8"]) == 0
        drawn.append((tmp_path / str(changed) / "grid.png").read_bytes())
    assert drawn[0] != drawn[1]


def test_a_token_critic_reads_what_its_generator_does(store, tmp_path, capsys):  # noqa: F811
    run(store, tmp_path / "plain", *texts("bert"), steps=1)
    words = ["training.critic=token", "model.transformer.critic_head=true", *texts("bert")]
    words += [f"training.critic_generator={tmp_path}/plain/model"]
    run(store, tmp_path / "critic", *words, steps=1)
    place, null = f"dataset.train_store={store}", "model.null_condition=learned"
    assert "its null_text_length is None, the critic's 12" in refused(capsys, place, *words, null)
    words[-2:] = [*texts("clip"), words[-1], *UVIT]
    assert "must be of one model.architecture" in refused(capsys, place, *words)
