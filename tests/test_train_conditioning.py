"""Texts and sizes of rows as the model gets them, from store to trained pictures."""

import json

import numpy as np
import pytest
import torch
from text_factory import make_bert, make_clip, make_t5
from text_store import CAPTION, SUBJECTS, make_text_store

from configs.load import ConfigError, load_config
from storage.reader import TokenStore
from tokenize_stage.text.text_encoder import TextEncoder
from train_stage.conditioning.conditioner import Conditioner, make_prompt_encoder
from train_stage.config import TrainConfig
from train_stage.generate import main as generate
from train_stage.loading.loader import TokenLoader
from train_stage.train import main as train

CPU = torch.device("cpu")
TINY = [
    "model.transformer.hidden_size=24",
    "model.transformer.num_hidden_layers=1",
    "model.transformer.num_attention_heads=2",
    "model.transformer.intermediate_size=32",
]
UVIT = [
    "model.architecture=uvit",
    "model.transformer.in_channels=16",
    "model.transformer.block_out_channels=[16]",
    "model.transformer.block_num_heads=2",
    "model.transformer.num_res_blocks=1",
    "model.transformer.micro_cond_encode_dim=8",
    "model.transformer.micro_cond_embed_dim=40",
]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    made = {"clip": make_clip, "t5": make_t5, "bert": make_bert}
    return {name: make(root / name) for name, make in made.items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory, encoders):
    """Ids of three tokenizers; states of BERT, and of CLIP those before the last layer."""
    folder = tmp_path_factory.mktemp("text-store")
    return make_text_store(folder, encoders, states=["clip", "bert"], pooled=["clip"])


def options(store, *words):
    required = [
        "experiment.output_dir=x",
        "training.max_train_steps=1",
        "optimizer.params.learning_rate=1",
    ]
    return load_config(TrainConfig, [*required, f"dataset.train_store={store}", *words])


def texts(*names, **more):
    return [f"model.text_encoders.{name}={more or '{}'}" for name in names]


def make(store, words, has_micro=False):
    config = options(store, *words)
    opened = TokenStore(store)
    encoder = make_prompt_encoder(config.model, opened, has_micro, CPU)
    return Conditioner(encoder, config.model, opened, has_micro, CPU)


def batch_of(store, conditioner, size=64):
    loader = TokenLoader(TokenStore(store), size, seed=1, columns=conditioner.columns)
    return loader.batch(0)


def nothing_dropped(batch):
    return torch.zeros(len(batch.rows), dtype=torch.bool)


def captions_of(store, batch):
    table = TokenStore(store).table(["caption"], batch.rows)
    return [caption or "" for caption in table.column(0).to_pylist()]


def test_clip_ids_become_what_its_encoder_makes_of_the_captions(store, encoders):
    conditioner = make(store, texts("clip", source="ids"), has_micro=True)
    batch = batch_of(store, conditioner)
    given = conditioner(batch, nothing_dropped(batch))
    made = TextEncoder.from_pretrained(encoders["clip"]).encode(captions_of(store, batch))
    torch.testing.assert_close(given["encoder_hidden_states"], made.states)
    torch.testing.assert_close(given["cond_embeds"], made.pooled)
    assert "encoder_attention_mask" not in given  # padding is seen, as published


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_stored_states_are_those_of_the_ids_where_there_is_text(store, name):
    both = []
    for source in ("ids", "states"):
        words = texts(name, source=source, **({"hide_padding": True} if source == "ids" else {}))
        conditioner = make(store, words, has_micro=True)
        batch = batch_of(store, conditioner)
        both.append(conditioner(batch, nothing_dropped(batch)))
    mask = both[0]["encoder_attention_mask"]
    assert torch.equal(mask, both[1]["encoder_attention_mask"]) and not mask.all()
    for key in ("encoder_hidden_states", "cond_embeds"):
        ours, theirs = (given[key] for given in both)
        if key == "encoder_hidden_states":
            ours, theirs = ours[mask], theirs[mask]
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_a_bert_is_not_told_of_padding(store, encoders):
    conditioner = make(store, texts("bert", source="ids"))
    batch = batch_of(store, conditioner)
    given = conditioner(batch, nothing_dropped(batch))
    encoder = TextEncoder.from_pretrained(encoders["bert"])
    for row, caption in list(enumerate(captions_of(store, batch)))[:5]:
        ids = encoder.tokenizer(caption, return_tensors="pt").input_ids
        alone = encoder.model(ids).last_hidden_state[0]  # not padded at all
        states = given["encoder_hidden_states"][row, : len(alone)]
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)
        assert given["encoder_attention_mask"][row].sum() == len(alone)


def test_two_encoders_follow_one_another(store):
    words = texts("clip", source="ids") + texts("t5") + texts("bert", source="ids")
    conditioner = make(store, words, has_micro=True)
    batch = batch_of(store, conditioner)
    given = conditioner(batch, nothing_dropped(batch))
    parts = []
    for name in ("clip", "t5", "bert"):
        one = make(store, texts(name, source="ids"), has_micro=True)
        parts.append(one(batch_of(store, one), nothing_dropped(batch)))
    states, mask = given["encoder_hidden_states"], given["encoder_attention_mask"]
    at = 0
    for part in parts:
        own = part["encoder_hidden_states"]
        stop = at + own.shape[1]
        assert torch.equal(states[:, at:stop, : own.shape[2]], own)
        assert not states[:, at:stop, own.shape[2] :].any()
        shown = part.get("encoder_attention_mask", torch.ones(own.shape[:2], dtype=torch.bool))
        assert torch.equal(mask[:, at:stop], shown)
        at = stop
    assert at == states.shape[1] and states.shape[2] == 20
    assert torch.equal(given["cond_embeds"], parts[0]["cond_embeds"])


def test_dropped_rows_get_all_of_the_empty_text_and_others_their_own(store):
    conditioner = make(store, texts("clip", source="ids") + texts("t5"), has_micro=True)
    batch = batch_of(store, conditioner)
    dropped = torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.5
    given, whole = conditioner(batch, dropped), conditioner(batch, nothing_dropped(batch))
    absent = conditioner.absent()
    names = {
        "encoder_hidden_states": "negative_embeds",
        "cond_embeds": "negative_cond_embeds",
        "encoder_attention_mask": "negative_attention_mask",
    }
    for name, negative in names.items():
        assert torch.equal(given[name][~dropped], whole[name][~dropped])
        expected = absent[negative].expand_as(given[name])
        assert torch.equal(given[name][dropped], expected[dropped])
    assert torch.equal(given["micro_conds"], whole["micro_conds"])  # told either way


def test_micro_conditions_are_the_originals_sizes_crops_and_scores(store):
    conditioner = make(store, [*texts("clip"), "model.aesthetic_score=5.5"], has_micro=True)
    batch = batch_of(store, conditioner)
    micro = conditioner(batch, nothing_dropped(batch))["micro_conds"].numpy()
    rows = batch.rows
    scale = 8 / 16  # to the store's resolution
    expected = [300 + rows, 100 + rows, rows / 2 * scale, rows / 4 * scale]
    expected.append(np.where(rows % 8 == 0, 5.5, 4 + rows / 200))
    np.testing.assert_allclose(micro, np.stack(expected, 1), rtol=1e-6)


def test_names_of_classes_as_text(tmp_path, encoders):
    path = make_text_store(tmp_path, {}, class_names=True)
    words = [f"model.text_encoders.clip.pretrained={encoders['clip']}"]
    conditioner = make(path, [*words, f"model.class_prompt={CAPTION}"])
    assert conditioner.columns == ()
    batch = batch_of(path, conditioner)
    batch.class_ids[0] = -1
    states = conditioner(batch, nothing_dropped(batch))["encoder_hidden_states"]
    prompts = ["", *(CAPTION.format(SUBJECTS[c]) for c in batch.class_ids[1:])]
    made = TextEncoder.from_pretrained(encoders["clip"]).encode(prompts, pooled=False)
    torch.testing.assert_close(states, made.states)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (texts("dino"), "model.text_encoders.dino: the store has no text_ids_dino, but clip, t5"),
        (texts("t5", source="states"), "no text_states_t5; take ids"),
        (texts("bert", hide_padding=False), "states of padding are not stored"),
        (["model.class_prompt=a cat"], "write {} where the class's name belongs"),
        (["model.class_prompt=a {}"], "give model.text_encoders"),
        (["model.architecture=uvit"], "model.architecture=uvit reads text"),
        (["model.null_condition=learned"], "is for text"),
        ([*texts("t5"), "model.transformer.num_res_blocks=1"], "not a keyword of model.arch"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(store, words, message):
    with pytest.raises(ConfigError, match=message.replace("{}", r"\{\}")):
        make(store, words)


def run(store, folder, *words, steps=4):
    argv = [f"dataset.train_store={store}", f"experiment.output_dir={folder}", *TINY]
    argv += [f"training.max_train_steps={steps}", "training.batch_size=16"]
    argv += ["optimizer.params.learning_rate=3e-3", "lr_scheduler.params.warmup_steps=1"]
    assert train([*argv, "experiment.log_every=1", "experiment.save_every=0", *words]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stored_states_train_like_ids(store, tmp_path):
    losses = [
        [line["loss"] for line in run(store, tmp_path / source, *texts("bert", source=source))]
        for source in ("ids", "states")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("null", ["empty", "learned"])
def test_a_uvit_of_two_encoders_is_trained_seen_and_asked(store, tmp_path, null):
    words = [*texts("clip", source="ids"), *texts("t5"), *UVIT, f"model.null_condition={null}"]
    folder = tmp_path / "run"
    words += ["experiment.generate_every=2", "generation.timesteps=2", "training.use_ema=true"]
    run(store, folder, *words, "generation.images_per_class=2", "generation.classes=3", steps=2)
    assert (folder / "samples/step-00000002.png").is_file()
    condition = json.loads((folder / "model/codes.json").read_text())["condition"]
    assert list(condition["text_encoders"]) == ["clip", "t5"]
    argv = [f"model={folder}/model", f"output_dir={tmp_path}/out", "timesteps=2"]
    prompts = "prompts=[a photo of the cat, a photo of the moon]"
    assert generate([*argv, prompts, "images_per_class=2", "guidance_scale=2"]) == 0
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 4


def test_the_text_is_what_tells_the_codes(store, tmp_path):
    """A model that reads captions gets below what one without could reach."""
    words = [*texts("bert"), "training.cond_dropout_prob=0", "experiment.max_train_examples=150"]
    lines = run(store, tmp_path / "run", *words, "training.min_masking_rate=1", steps=250)
    given = np.mean([line["cross_entropy"] for line in lines[-20:]])
    blind = np.log(4 * len(SUBJECTS))  # all codes hidden: any subject, any of its codes
    assert np.log(4) < given < 0.75 * blind


def test_class_names_are_drawn_by_their_ids(tmp_path, encoders):
    path = make_text_store(tmp_path, {}, class_names=True)
    words = [f"model.text_encoders.clip.pretrained={encoders['clip']}"]
    words += [f"model.class_prompt={CAPTION}", "generation.timesteps=2"]
    run(path, tmp_path / "run", *words, "experiment.generate_every=2", steps=2)
    argv = [f"model={tmp_path}/run/model", f"output_dir={tmp_path}/out", "timesteps=2"]
    assert generate([*argv, "class_ids=1,3", "images_per_class=1"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["1", "3"]
