"""The text encoder: which states it gives, which folders it opens."""

import json
import sys

import pytest
import torch
from pipeline_factory import CLIP, WORDS, make_encoder, make_tokenizer

from tokenize_stage.text.text_encoder import TextEncoder

transformers = pytest.importorskip("transformers")


def test_clip_gives_the_states_before_its_last_layer_and_the_projected_text():
    encoder, seen = make_encoder(), []
    layers = encoder.model.text_model.encoder.layers
    hooks = [x.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for x in layers]
    made = encoder.encode(["a cat", "dog"])
    for hook in hooks:
        hook.remove()
    assert made.states.shape == (2, 12, 16) and torch.equal(made.states, seen[2])
    assert made.attention_mask.sum(1).tolist() == [6, 5]  # letters, start and end
    ids = encoder.tokenizer(["a cat", "dog"], padding="max_length", return_tensors="pt").input_ids
    plain = encoder.model(ids)
    assert torch.equal(made.pooled, plain.text_embeds) and made.pooled.shape == (2, 12)
    assert torch.equal(encoder.encode(["a cat", "dog"], clip_skip=2).states, seen[1])
    all_layers = encoder.encode(["a cat", "dog"], clip_skip=0).states
    normed = encoder.model.text_model.final_layer_norm(all_layers)
    assert torch.equal(normed, plain.last_hidden_state)
    last = encoder.encode(["a cat", "dog"], pooled=False)
    assert torch.equal(last.states, plain.last_hidden_state) and last.pooled is None
    with pytest.raises(ValueError, match="clip_skip=4: the text encoder has layers 0..3"):
        encoder.encode(["a"], clip_skip=4)
    assert encoder.encode(["abcdefghijklmnop"]).attention_mask.sum() == 12
    assert encoder.cut_prompts(["a cat", "abcdefghijklmnop", "abcdefghij"]) == ["abcdefghijklmnop"]


@pytest.mark.parametrize("kind", ["CLIPTextModelWithProjection", "CLIPTextModel", "T5EncoderModel"])
def test_the_class_of_an_encoder_is_read_from_its_folder(tmp_path, kind):
    if kind == "T5EncoderModel":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(vocab_size=len(WORDS), **sizes)
        encoder = TextEncoder(transformers.T5EncoderModel(config), make_tokenizer())
    else:
        encoder = make_encoder(kind)
    encoder.save_pretrained(tmp_path)
    loaded = TextEncoder.from_pretrained(tmp_path)
    assert type(loaded.model).__name__ == kind
    assert not loaded.model.training and not any(x.requires_grad for x in loaded.model.parameters())
    before, after = (x.encode(["a cat", ""]) for x in (encoder, loaded))
    assert torch.equal(before.states, after.states) and before.states.shape == (2, 12, 16)
    assert (after.pooled is None) == (kind != "CLIPTextModelWithProjection")
    if after.pooled is None:
        with pytest.raises(ValueError, match=f"a {kind} gives no pooled vector"):
            loaded.encode(["a"], pooled=True)


def test_a_whole_clip_gives_its_text_half_and_missing_weights_are_refused(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8}
    vision |= {"num_attention_heads": 2, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=CLIP, vision_config=vision, projection_dim=12)
    make_tokenizer().save_pretrained(tmp_path)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    assert TextEncoder.from_pretrained(tmp_path).encode(["a"]).pooled.shape == (1, 12)
    content = json.loads((tmp_path / "config.json").read_text())
    bart = {"architectures": ["BartModel"], "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(content | bart))
    with pytest.raises(
        ValueError, match=r"architectures=\['BartModel'\], which decodes, too; .*: CLIP"
    ):
        TextEncoder.from_pretrained(tmp_path)
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    named = content | {"architectures": ["CLIPTextModelWithProjection"]}
    (tmp_path / "config.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match="lacks weights .*\n  text_projection.weight"):
        TextEncoder.from_pretrained(tmp_path)


def test_without_transformers_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'open-muse\[text\]'"):
        TextEncoder.from_pretrained(tmp_path)
