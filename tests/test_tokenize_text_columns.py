"""Text columns: ids as the text encoder reads them, states of the caption alone, their cost."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from text_factory import (
    CAPTIONS,
    POSITIONS,
    make_clip,
    make_clip_tokenizer,
    make_t5,
    make_t5_tokenizer,
    transformers,
)
from tokenizers import Tokenizer, models

from configs.load import ConfigError, load_config
from storage.reader import TokenStore
from storage.schema import ArrayColumn, StoreMeta, StoreMismatch, read_meta
from storage.schema import Tokenizer as Codes
from storage.text_states import read_text_states
from storage.writer import ShardWriter, create_store
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.text.config import TextConfig
from tokenize_stage.text.cost import describe_cost, row_bytes
from tokenize_stage.text.text_columns import TextColumns
from tokenize_stage.text.text_encoder import TextEncoder
from tokenize_stage.text.tokenizer import CaptionTokenizer

REQUIRED = ["dataset.shards_path_or_url=x", "model.vq_model.pretrained=y", "store.path=z"]
TEXTS = [caption or "" for caption in CAPTIONS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return {"clip": make_clip(root / "clip"), "t5": make_t5(root / "t5")}


def open_columns(folders, **options):
    return TextColumns(TextConfig(tokenizers=dict(folders), dtype="float32", **options))


def meta_of(text, backend="zarr", **changes):
    arrays = {"codes": ArrayColumn("uint16", [16]), **text.arrays}
    codes = {"codes": Codes("vq", "X", 1024, [4, 4], "f" * 64)}
    options = {"transform": {"text": text.record()}, "backend": backend, "chunk_rows": 64}
    return StoreMeta(32, arrays, codes, **options | changes)


def write_shard(path, name, text, captions):
    with ShardWriter(path, name, f"{name}.tar", extra_columns=text.fields) as writer:
        rows = range(len(captions))
        row = {"codes": np.zeros((len(captions), 16), int), "key": [f"{name}-{i}" for i in rows]}
        writer.add({**row, "caption": captions, **text.columns(captions)})


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_stored_ids_make_the_states_that_the_prompt_makes(folders, name):
    encoder, text = TextEncoder.from_pretrained(folders[name]), open_columns(folders)
    made = text.columns(CAPTIONS)
    ids, lengths = made[f"text_ids_{name}"], made[f"text_length_{name}"]
    theirs = encoder.tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=encoder.max_length
    )
    np.testing.assert_array_equal(ids, theirs.input_ids)
    np.testing.assert_array_equal(lengths, np.sum(theirs.attention_mask, axis=1))
    assert ids.dtype == "uint16" and text.arrays[f"text_ids_{name}"].shape == [ids.shape[1]]
    own = encoder.encode_ids(torch.from_numpy(ids.astype(np.int64)))
    prompts = encoder.encode(TEXTS)
    assert torch.equal(own.states, prompts.states)
    assert (own.pooled is None) == (name == "t5")
    if own.pooled is not None:
        assert torch.equal(own.pooled, prompts.pooled)


def test_a_missing_caption_is_empty_and_long_ones_are_counted(folders):
    text = open_columns(folders)
    made = text.columns(CAPTIONS)
    for name in folders:
        ids, lengths = made[f"text_ids_{name}"], made[f"text_length_{name}"]
        np.testing.assert_array_equal(ids[1], ids[2])
        assert lengths[1] == lengths[2] == (2 if name == "clip" else 1)
        assert (ids[1, lengths[1] :] == text.tokenizers[name].pad_id).all()
    text.columns(["x" * 70_000, "x" * 10])  # the first is not even read to its end
    cut = {
        name: sum(len(ids) > text.tokenizers[name].length for ids in tokenize(folders[name]))
        for name in folders
    }
    assert cut["clip"] == 3
    for line, name in zip(text.summary(), folders, strict=True):
        length = text.tokenizers[name].length
        assert line == f"text_ids_{name}: {cut[name] + 1} of 10 captions cut to {length} ids"
    assert not TextColumns(TextConfig()).columns(CAPTIONS)


def tokenize(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, verbose=False).input_ids


def test_lengths_follow_the_option_and_ids_their_vocabulary(folders, tmp_path):
    text = open_columns(folders, lengths={"t5": 7})
    assert [text.arrays[f"text_ids_{n}"].shape for n in folders] == [[POSITIONS], [7]]
    encoder = TextEncoder.from_pretrained(folders["t5"], length=7)
    states = encoder.encode(TEXTS).states
    assert states.shape == (len(TEXTS), 7, 16)
    ids = text.columns(CAPTIONS)["text_ids_t5"]
    assert torch.equal(encoder.encode_ids(torch.from_numpy(ids.astype(int))).states, states)
    encoder.save_pretrained(tmp_path / "again")
    assert TextEncoder.from_pretrained(tmp_path / "again").max_length == 7
    words = {f"w{number}": number for number in range(70_000)} | {"<pad>": 70_000}
    wide = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>"
    )
    with pytest.raises(ValueError, match=r"does not say .*text.lengths.wide \(77 for CLIP"):
        CaptionTokenizer(wide, None, "wide")
    made = CaptionTokenizer(wide, 3, "wide")(["w69999", ""])
    assert made.ids.dtype == "uint32" and made.ids.tolist() == [[69999] + [70000] * 2, [70000] * 3]
    wide.padding_side = "left"
    with pytest.raises(ValueError, match="pads on the left"):
        CaptionTokenizer(wide, 3, "wide")


def test_states_and_pooled_depend_on_the_caption_alone(folders):
    """In float32 on the CPU to the bit: alone, among others, in another place or batch."""
    text = open_columns(folders, states=["clip", "t5"], pooled=["clip"], batch_size=3)
    made = text.columns(CAPTIONS)
    backwards = text.columns(CAPTIONS[::-1])
    for name, values in made.items():
        values = values.to_pylist() if isinstance(values, pa.Array) else values.tolist()
        other = backwards[name]
        other = other.to_pylist() if isinstance(other, pa.Array) else other.tolist()
        assert values == other[::-1]
        for row, caption in enumerate(CAPTIONS):
            alone = text.columns([caption])[name]
            alone = alone.to_pylist() if isinstance(alone, pa.Array) else alone.tolist()
            assert alone == values[row : row + 1], (name, caption)
    for name, pooled in (("clip", True), ("t5", False)):
        encoded = TextEncoder.from_pretrained(folders[name]).encode(TEXTS, pooled)
        for row, length in enumerate(made[f"text_length_{name}"]):
            states = made[f"text_states_{name}"][row].as_py()
            expected = encoded.states[row, :length].numpy()
            np.testing.assert_allclose(states, expected, rtol=1e-3, atol=1e-6)  # 2 ulp of float16
        if pooled:
            found = made["text_pooled_clip"]
            assert found.dtype == "float16" and found.shape == (len(CAPTIONS), 12)
            np.testing.assert_allclose(found, encoded.pooled.numpy(), rtol=1e-3, atol=1e-6)
    states_alone = open_columns(folders, states=["clip"]).columns(["a photo"])["text_states_clip"]
    last = TextEncoder.from_pretrained(folders["clip"]).encode(["a photo"], pooled=False).states
    found = np.array(states_alone[0].as_py())
    np.testing.assert_allclose(found, last[0, : len(found)].numpy(), rtol=1e-3, atol=1e-6)
    assert not text.columns([])["text_ids_clip"].size


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_near(folders, dtype):
    config = TextConfig(dict(folders), states=["clip", "t5"], pooled=["clip"], dtype=dtype)
    made, exact = (
        TextColumns(dataclasses.replace(config, dtype=kind)).columns(CAPTIONS)
        for kind in (dtype, "float32")
    )
    pairs = [(x["text_pooled_clip"] for x in (made, exact))]
    for name in folders:
        states = f"text_states_{name}"
        pairs.append(np.array(x[states].flatten().to_pylist()) for x in (made, exact))
    for found, right in pairs:
        found, right = found.astype(np.float64), right.astype(np.float64)
        assert 0 < np.linalg.norm(found - right) < 0.05 * np.linalg.norm(right)


@pytest.mark.parametrize("backend", ["zarr", "arrow"])
def test_a_store_keeps_text_and_gives_it_back_padded(folders, tmp_path, backend):
    text = open_columns(folders, states=["clip"], pooled=["clip"])
    path = tmp_path / "store"
    create_store(path, meta_of(text, backend))
    for name, captions in (("00000", CAPTIONS), ("00001", []), ("00002", CAPTIONS[:3])):
        write_shard(path, name, text, captions)
    store, whole = TokenStore(path), text.columns([*CAPTIONS, *CAPTIONS[:3]])
    rows = [9, 0, 4]
    for name in ("text_ids_clip", "text_ids_t5", "text_pooled_clip"):
        np.testing.assert_array_equal(store.read_codes(rows, name), whole[name][rows])
    states, lengths = read_text_states(store, "clip", rows)
    assert states.dtype == np.float16 and states.shape == (3, POSITIONS, 16)
    assert lengths.tolist() == whole["text_length_clip"][rows].tolist() == [2, 7, 16]
    for row, length, padded in zip(rows, lengths, states, strict=True):
        expected = np.array(whole["text_states_clip"][row].as_py(), np.float16)
        np.testing.assert_array_equal(padded[:length], expected)
        assert not padded[length:].any()
    assert read_text_states(store, "clip", [9])[0].shape == (1, 2, 16)
    assert read_text_states(store, "clip", [9], 77)[0].shape == (1, 77, 16)
    assert read_text_states(store, "clip", [])[0].shape == (0, 0, 16)
    with pytest.raises(ValueError, match="length=6: a row has the states of 16 tokens"):
        read_text_states(store, "clip", slice(None), 6)
    with pytest.raises(ValueError, match="no column 'text_states_t5'"):
        read_text_states(store, "t5", [0])
    tables = store.table(["text_length_t5"])["text_length_t5"].to_pylist()
    assert tables == whole["text_length_t5"].tolist()


def test_stock_tools_read_states(folders, tmp_path):
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    text = open_columns(folders, states=["clip"])
    create_store(tmp_path, meta_of(text))
    write_shard(tmp_path, "0", text, CAPTIONS)
    file = tmp_path / "shards" / "0" / "rows.parquet"
    expected = text.columns(CAPTIONS)["text_states_clip"].to_pylist()
    assert pa.parquet.read_table(file)["text_states_clip"].to_pylist() == expected
    assert polars.read_parquet(file)["text_states_clip"].to_list() == expected
    query = f"select key, text_states_clip, text_length_clip from '{file}' order by key"
    found = duckdb.sql(query).fetchall()
    assert [states for _, states, _ in found] == expected
    assert [len(states) for _, states, _ in found] == [length for *_, length in found]


def test_the_store_says_what_made_its_text(folders, tmp_path):
    text = open_columns(folders, states=["clip"])
    record = text.record()["tokenizers"]["clip"]
    assert record["name"] == folders["clip"] and record["length"] == POSITIONS
    encoder = TextEncoder.from_pretrained(folders["clip"])
    assert record["vocabulary_size"] == len(encoder.tokenizer)
    assert record["pad_id"] == encoder.tokenizer.pad_token_id
    create_store(tmp_path / "store", meta_of(text))
    stored = read_meta(tmp_path / "store").transform["text"]
    assert stored == text.record() and stored["encoders"]["clip"]["layer"] == "last, normalized"
    # elsewhere, and used meanwhile, it is the same
    encoder.tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=9)
    encoder.save_pretrained(tmp_path / "moved")
    moved = open_columns(folders | {"clip": str(tmp_path / "moved")}, states=["clip"])
    assert moved.record() != text.record()
    assert meta_of(moved).fingerprint == meta_of(text).fingerprint
    create_store(tmp_path / "store", meta_of(moved))
    encoder.check_tokenizer(record)
    # another one is not
    make_clip_tokenizer("quite other words " * 9).save_pretrained(tmp_path / "moved")
    other = TextColumns(TextConfig({"clip": str(tmp_path / "moved")}))
    assert (
        meta_of(other).fingerprint != meta_of(open_columns({"clip": folders["clip"]})).fingerprint
    )
    with pytest.raises(ValueError, match="text ids are by .*clip, of fingerprint '"):
        TextEncoder.from_pretrained(tmp_path / "moved").check_tokenizer(record)
    with pytest.raises(ValueError, match="of length 16; this text encoder has 9: open the one"):
        TextEncoder.from_pretrained(folders["clip"], length=9).check_tokenizer(record)
    shorter = open_columns(folders, states=["clip"], lengths={"t5": 5})
    with pytest.raises(StoreMismatch, match=r"arrays.text_ids_t5.shape: \[24\] != \[5\]"):
        create_store(tmp_path / "store", meta_of(shorter))


def test_what_does_not_fit_is_refused(folders, tmp_path):
    for options, words in (
        ({"pooled": ["t5"]}, r"text.pooled=\['t5'\]: t5 is a T5EncoderModel, which gives none"),
        ({"states": ["clip"], "lengths": {"clip": 77}}, "clip=77: this encoder takes 16 at most"),
    ):
        with pytest.raises(ValueError, match=words):
            open_columns(folders, **options)
    small = make_clip(tmp_path / "small", vocab_size=100)
    with pytest.raises(ValueError, match="a tokenizer of .* ids, an encoder of 100"):
        open_columns({"clip": small}, states=["clip"])
    make_t5_tokenizer().save_pretrained(tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match="config.json"):
        open_columns({"t5": str(tmp_path / "alone")}, states=["t5"])
    assert open_columns({"t5": str(tmp_path / "alone")}).arrays
    with pytest.raises(FileNotFoundError, match="nowhere holds no tokenizer"):
        open_columns({"t5": str(tmp_path / "nowhere")})
    large = make_clip(tmp_path / "large")
    weights = load_file(tmp_path / "large" / "model.safetensors")
    weights["text_projection.weight"] *= 1e6
    save_file(weights, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="float16 cannot hold, computed in text.dtype=float32"):
        open_columns({"clip": large}, pooled=["clip"]).columns(["a cat"])


def test_options_are_given_by_name():
    words = "text.tokenizers.clip=a/b text.tokenizers.t5=c text.lengths.t5=128 text.states=[clip]"
    config = load_config(TokenizeConfig, [*words.split(), *REQUIRED])
    assert config.text == TextConfig({"clip": "a/b", "t5": "c"}, {"t5": 128}, states=["clip"])
    with pytest.raises(ConfigError, match="text.pooled=.*legal names, each once, are clip, t5"):
        load_config(TokenizeConfig, [*words.split(), *REQUIRED, "text.pooled=[bert]"])
    with pytest.raises(ConfigError, match="text.dtype.*float8"):
        load_config(TokenizeConfig, [*REQUIRED, "text.dtype=float8"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizers": {"Clip!": "x"}}, "text.tokenizers.Clip!: a name has a-z"),
        ({"states": ["clip"]}, "text.states=.*legal names, each once, are none"),
        ({"tokenizers": {"t5": "x"}, "pooled": ["clip"]}, "text.pooled=.*are t5"),
        ({"tokenizers": {"t5": "x"}, "pooled": ["t5", "t5"]}, "each once"),
        ({"tokenizers": {"t5": "x"}, "lengths": {"t5": 1}}, r"text.lengths.t5=1: .* 2\.\.32767"),
        ({"batch_size": 0}, "text.batch_size=0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TextConfig(**options)


def test_the_cost_is_what_the_store_takes(folders, tmp_path):
    text = open_columns(folders, states=["clip"], pooled=["clip"])
    captions = [f"{text or 'x'} {row}" for row in range(80) for text in CAPTIONS]
    meta = meta_of(text)
    create_store(tmp_path, meta)
    write_shard(tmp_path, "0", text, captions)
    found = row_bytes(text, meta, captions)
    shard = tmp_path / "shards" / "0"
    for name in ("text_ids_clip", "text_ids_t5"):
        taken = sum(f.stat().st_size for f in (shard / f"{name}.zarr" / "c").rglob("*")
                    if f.is_file()) / len(captions)  # fmt: skip
        assert found[name] == pytest.approx(taken, rel=0.1), name
    plain = TokenStore(tmp_path).table(["text_length_clip"])["text_length_clip"].to_numpy().mean()
    assert found["text_states_clip"] == plain * 16 * 2
    lines = describe_cost(text, meta, captions, 10_000_000).splitlines()
    assert lines[0].startswith(f"ids a caption, of the first 640: clip {plain:.1f}, t5 ")
    assert any(line.split()[0] == "codes" and line.split()[1] == "20.0" for line in lines)
    share = found["text_states_clip"] / sum(found.values())
    assert lines[-1].startswith(f"  text_states_clip is {share:.0%} of the store")
    assumed = describe_cost(text, dataclasses.replace(meta, backend="arrow"), [], 1000)
    assert "assumed" in assumed and "clip 16.0, t5 24.0" in assumed
    exact = row_bytes(text, dataclasses.replace(meta, backend="arrow"))
    assert exact["text_ids_t5"] == 48 and exact["codes"] == 32
