"""The presets: against the literature, and what is counted against the same by hand."""

import pytest
import torch

from train_stage.models.sizes import (
    CLASS_CONDITIONAL,
    MODELS,
    SIZES,
    condition_shapes,
    count_parameters,
    flops_per_token,
    size_fields,
)
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT, MaskGiTUViTConfig

VIT = {"tiny": 5.7, "small": 22, "base": 86, "large": 304, "xl": 632}  # M, the last is ViT-Huge


def on_meta(architecture, **fields):
    with torch.device("meta"):
        return MODELS[architecture](**fields)


@pytest.mark.parametrize("name", VIT)
def test_a_transformer_is_as_large_as_the_vit_of_its_name(name):
    model = on_meta("transformer", **size_fields(name), **CLASS_CONDITIONAL)
    assert count_parameters(model) == pytest.approx(1e6 * VIT[name], rel=0.1)
    assert count_parameters(model) == sum(t.numel() for t in model.state_dict().values())


def test_heads_are_64_wide():
    for architecture in SIZES.values():
        for fields in architecture.values():
            assert fields["hidden_size"] == 64 * fields["num_attention_heads"]
            if "block_num_heads" in fields:
                assert fields["block_out_channels"] == (64 * fields["block_num_heads"],)


def test_a_large_uvit_is_the_published_one():
    assert MaskGiTUViTConfig(**size_fields("large", "uvit")) == MaskGiTUViTConfig()


def test_what_there_is_not():
    with pytest.raises(ValueError, match="size 'huge': legal are tiny, small, base, large, xl"):
        size_fields("huge")
    with pytest.raises(ValueError, match="architecture 'cnn': legal are transformer, uvit"):
        size_fields("base", "cnn")
    size_fields("base")["hidden_size"] = 3
    assert size_fields("base")["hidden_size"] == 768


@pytest.mark.parametrize("scored", [1.0, 0.5])
def test_operations_by_hand(scored):
    model: MaskGitTransformer = on_meta("transformer", **size_fields("tiny"), **CLASS_CONDITIONAL)
    length, width, layers, inner = 200, 192, 12, 512
    matrices = layers * (4 * width**2 + 3 * width * inner)
    head = width**2 + width * model.output_size
    attention = layers * 2 * length * width  # scores and sums, over all tokens
    forward, training = flops_per_token(model, length, scored)
    assert forward == 2 * (matrices + scored * head + attention)
    assert training == 3 * forward


def test_a_condition_counts():
    uvit = on_meta("uvit", **size_fields("tiny", "uvit"))
    assert condition_shapes(uvit) == {
        "encoder_hidden_states": (77, 768),
        "cond_embeds": (768,),
        "micro_conds": (5,),
    }
    forward, training = flops_per_token(uvit, 64)
    assert 2 * forward < training < 4 * forward
    text = {"add_cross_attention": True, "encoder_hidden_size": 64}
    plain, crossed = (on_meta("transformer", **size_fields("tiny"), **f) for f in ({}, text))
    assert condition_shapes(plain) == {}
    assert flops_per_token(crossed, 64)[0] > flops_per_token(plain, 64)[0]
    assert isinstance(uvit, MaskGiTUViT)
