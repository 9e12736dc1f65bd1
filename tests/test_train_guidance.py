"""Conditions: computed once, no more rows than differ, guidance and its schedules, text masks."""

from functools import partial

import pytest
import torch
from small_models import (
    Recorder,
    class_model,
    seeded,
    text_condition,
    text_model,
    uvit_condition,
    uvit_model,
    uvit_negative,
)

from train_stage.models.layers import LayerContext
from train_stage.sampling.generation import generate
from train_stage.sampling.guidance import distinct_rows, guidance_scales, select_rows


@pytest.fixture(scope="module")
def model():
    return class_model()


@pytest.fixture(scope="module")
def texts():
    return text_model()


@pytest.fixture(scope="module")
def uvit():
    return uvit_model()


def test_guidance_zero_and_one_are_the_conditional_model(model, uvit):
    class_ids = torch.tensor([1, 2])
    plain = generate(model, class_ids=class_ids, guidance_scale=0.0, generator=seeded())
    one = generate(model, class_ids=class_ids, guidance_scale=1.0, generator=seeded())
    assert torch.equal(plain, one)
    fraction = generate(model, class_ids=class_ids, guidance_scale=2.5, generator=seeded())
    assert fraction.shape == plain.shape
    recorder = Recorder(uvit)  # the reference crashes at 0
    generate(recorder, **uvit_condition(2), guidance_scale=0.0, seq_len=16, timesteps=2)
    assert [len(ids) for ids in recorder.inputs] == [2, 2]


def test_guidance_uses_the_mask_id_as_no_class(model):
    recorder = Recorder(model)
    generate(recorder, class_ids=torch.tensor([3, 4]), guidance_scale=2.0, timesteps=2)
    first, second = (ids[:, 0].tolist() for ids in recorder.inputs)
    assert second == [63, 64, model.mask_token_id, model.mask_token_id]
    assert first == [63, 64, model.mask_token_id]  # what is the same twice is computed once


def test_the_condition_is_computed_once_and_equal_rows_are_one(uvit):
    condition = {name: x[:1] for name, x in uvit_condition(1).items()}
    recorder = Recorder(uvit)
    options = dict(**uvit_negative(), seq_len=16, timesteps=4, guidance_scale=3.0)
    codes = generate(recorder, **condition, **options, rows=3, generator=seeded())
    assert len(recorder.contexts) == 1 and len(recorder.contexts[0]["cond_embeds"]) == 2
    assert [len(ids) for ids in recorder.inputs] == [2, 6, 6, 6]
    repeated = {name: x.expand(3, *x.shape[1:]) for name, x in condition.items()}
    assert torch.equal(codes, generate(uvit, **repeated, **options, generator=seeded()))


def test_text_that_the_mask_hides_does_not_matter(texts):
    text, junk = text_condition(2)["encoder_hidden_states"], torch.randn(2, 3, 24) * 9
    padded, mask = torch.cat([text, junk], 1), torch.tensor([[1] * 5 + [0] * 3]).expand(2, -1)
    options = dict(guidance_scale=3.0, timesteps=5)
    wanted = generate(
        texts, encoder_hidden_states=text, negative_embeds=text.flip(0), **options,
        generator=seeded(),
    )  # fmt: skip
    codes = generate(
        texts, encoder_hidden_states=padded, encoder_attention_mask=mask,
        negative_embeds=padded.flip(0), negative_attention_mask=mask, **options,
        generator=seeded(),
    )  # fmt: skip
    assert torch.equal(codes, wanted)


def test_where_one_half_has_no_mask_it_is_all_ones(texts):
    text = torch.randn(2, 5, 24, generator=seeded(1))
    mask, ones = torch.tensor([[1, 1, 1, 0, 0]]), torch.ones(1, 5)
    draw = partial(
        generate, texts, encoder_hidden_states=text, negative_embeds=text[:1], guidance_scale=3.0,
        timesteps=5,
    )  # fmt: skip
    for name, other in ("encoder", "negative"), ("negative", "encoder"):
        one, both = {f"{name}_attention_mask": mask}, {f"{other}_attention_mask": ones}
        codes = draw(**one, generator=seeded())
        assert torch.equal(codes, draw(**one, **both, generator=seeded()))
        assert not torch.equal(codes, draw(generator=seeded()))


def test_guidance_scales():
    assert guidance_scales(0.0, 4, None) is None and guidance_scales(1.0, 4, None) is None
    assert guidance_scales(3.0, 3, None) == [3.0] * 3
    assert guidance_scales(3.0, 4, "linear") == [0, 1, 2, 3]
    wanted = [7.5 * torch.cos(torch.pi / 2 * torch.tensor(1 - r / 3)).item() for r in (1, 2, 3)]
    assert guidance_scales(7.5, 3, "cosine") == pytest.approx(wanted)
    assert guidance_scales(7.5, 3, "cosine_floor") == [3, 6, 7]


def test_distinct_rows_give_back_all_rows():
    first = torch.tensor([[1], [1], [2], [2], [2]])
    second = torch.tensor([[0, 7], [0, 7], [0, 7], [0, 7], [0, 8]])
    distinct, index = distinct_rows([first, second])
    assert distinct.tolist() == [0, 2, 4] and index.tolist() == [0, 0, 1, 1, 2]
    context = (None, (LayerContext(text=(first, second), ffn=(second, first)),))
    few = select_rows(context, distinct)
    again = select_rows(few, index)
    assert isinstance(again[1][0], LayerContext) and again[0] is None
    assert torch.equal(again[1][0].text[0], first) and torch.equal(again[1][0].ffn[0], second)
