"""generate, for every model: what stays, what is computed, guidance, compile, refusals."""

from functools import partial

import pytest
import torch
from small_models import (
    Recorder,
    class_model,
    partly_masked,
    plain_decoding,
    seeded,
    text_condition,
    text_model,
    uvit_condition,
    uvit_model,
    uvit_negative,
)
from torch._dynamo.testing import CompileCounter

from train_stage.sampling.generation import add_mask_noise, generate
from train_stage.sampling.parallel_decoding import least_confident, step_temperatures


@pytest.fixture(scope="module")
def model():
    return class_model()


@pytest.fixture(scope="module")
def texts():
    return text_model()


@pytest.fixture(scope="module")
def uvit():
    return uvit_model()


def test_codes_only_and_seeded(model):
    class_ids = torch.tensor([1, 2, 3, 4])
    codes = model.generate(class_ids=class_ids, generator=seeded())
    assert codes.shape == (4, 16) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 60
    assert torch.equal(codes, model.generate(class_ids=class_ids, generator=seeded()))
    assert not torch.equal(codes, model.generate(class_ids=class_ids, generator=seeded(1)))
    assert class_ids.tolist() == [1, 2, 3, 4]  # the reference adds the codebook size in place


@pytest.mark.parametrize("scale", [0.0, 2.5])
@pytest.mark.parametrize("rows", [None, 3])
def test_classes_are_drawn_as_plain_decoding_does(model, scale, rows):
    class_ids = torch.tensor([4, 4, 7])
    ids = torch.full((3, 16), model.mask_token_id) if rows is None else partly_masked(model, 3)

    def predict(ids, previous):
        conditional = model(torch.cat([class_ids[:, None] + 60, ids], 1))[:, 1:]
        nothing = torch.full((3, 1), model.mask_token_id)
        unconditional = model(torch.cat([nothing, ids], 1))[:, 1:]
        return unconditional + scale * (conditional - unconditional) if scale else conditional

    temperatures = step_temperatures(1.0, 6, "linear")
    wanted = plain_decoding(predict, ids, model.mask_token_id, temperatures, seeded())
    codes = generate(
        model, class_ids=class_ids, input_ids=None if rows is None else ids, timesteps=6,
        guidance_scale=scale, generator=seeded(),
    )  # fmt: skip
    assert torch.equal(codes, wanted)


@pytest.mark.parametrize("negative", [False, True])
def test_text_is_drawn_as_plain_decoding_does(texts, negative):
    condition = text_condition(3)
    other = torch.randn(1, 5, 24, generator=seeded(2)) if negative else torch.zeros(1, 5, 24)

    def predict(ids, previous):
        conditional = texts(ids, **condition)
        unconditional = texts(ids, encoder_hidden_states=other.expand(3, -1, -1))
        return unconditional + 4.0 * (conditional - unconditional)

    ids = torch.full((3, 16), texts.mask_token_id)
    temperatures = step_temperatures(1.0, 6, "cumulative")
    wanted = plain_decoding(predict, ids, texts.mask_token_id, temperatures, seeded())
    codes = generate(
        texts, **condition, negative_embeds=other if negative else None, timesteps=6,
        guidance_scale=4.0, temperature_decay="cumulative", generator=seeded(),
    )  # fmt: skip
    assert torch.equal(codes, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_uvit_is_drawn_as_plain_decoding_does(uvit, masked):
    condition, negative = uvit_condition(3), uvit_negative()
    micro = condition["micro_conds"].expand(3, -1)
    none = [x.expand(3, *x.shape[1:]) for x in negative.values()]

    def predict(ids, previous):
        conditional = uvit(ids, *list(condition.values())[:2], micro)
        unconditional = uvit(ids, *none, micro)
        return unconditional + 3.0 * (conditional - unconditional)

    ids = partly_masked(uvit, 3) if masked else torch.full((3, 16), uvit.mask_token_id)
    temperatures = step_temperatures((2, 0), 6, "linear")
    wanted = plain_decoding(
        predict, ids, uvit.mask_token_id, temperatures, seeded(), "linear", share=0.7
    )
    codes = generate(
        uvit, **condition, **negative, input_ids=ids if masked else None, temperature=(2, 0),
        timesteps=6, guidance_scale=3.0, noise_schedule="linear", starting_mask_ratio=0.7,
        seq_len=16, generator=seeded(),
    )  # fmt: skip
    assert torch.equal(codes, wanted)


def test_settled_codes_stay_and_their_number_follows_the_schedule(model):
    recorder = Recorder(model)
    codes = generate(recorder, class_ids=torch.tensor([1, 2]), timesteps=8, generator=seeded())
    ids = torch.stack([given[:, 1:] for given in recorder.inputs])  # (steps, B, N)
    hidden = ids == model.mask_token_id
    steps = torch.arange(1, 8) / 8
    wanted = (16 * torch.cos(steps * torch.pi / 2)).floor().clamp(min=1).long()
    assert hidden[0].all() and hidden[1:].sum(-1)[:, 0].tolist() == wanted.tolist()
    assert not (hidden[1:] & ~hidden[:-1]).any()
    for given in ids:
        assert torch.equal(given[given != model.mask_token_id], codes[given != model.mask_token_id])
    assert recorder.heads == [(2, 16)] + [(2, count) for count in wanted]  # nothing for the rest


def test_inpainting_keeps_what_is_known(model):
    given = torch.randint(0, 60, (3, 16))
    known = torch.rand(3, 16) < 0.5
    ids = torch.where(known, given, model.mask_token_id)
    before = ids.clone()
    codes = generate(model, class_ids=torch.tensor([0, 1, 2]), input_ids=ids, generator=seeded())
    assert torch.equal(codes[known], given[known]) and codes.max() < 60
    assert torch.equal(ids, before)


def test_a_row_without_masks_stays_as_it_is(model):
    given = torch.randint(0, 60, (2, 16))
    ids = given.clone()
    ids[0] = model.mask_token_id
    codes = generate(model, class_ids=torch.tensor([0, 1]), input_ids=ids, generator=seeded())
    assert torch.equal(codes[1], given[1])
    assert torch.equal(generate(model, class_ids=torch.tensor([0]), input_ids=given)[1], given[1])


def test_without_condition(model):
    recorder = Recorder(model)
    codes = generate(recorder, rows=3, guidance_scale=3.0, timesteps=3, generator=seeded())
    assert codes.shape == (3, 16) and codes.max() < 60
    assert [len(ids) for ids in recorder.inputs] == [1, 3, 3]  # there is nothing to guide towards


def test_temperature_is_the_closed_form(model, uvit):
    """temperature * (1 - r); the reference multiplies it up step by step. The U-ViT's is linear."""
    used = []

    def spy(function):
        def watched(*given):
            if function.__name__ == "hide_again":
                used.append(given[-1].item())
            return function(*given)

        return watched

    def temperatures(model, temperature=2.0, **options):
        used.clear()
        generate(model, **options, seq_len=16, temperature=temperature, timesteps=4, compiler=spy)
        return used

    classes = {"class_ids": torch.tensor([1])}
    assert temperatures(model, **classes) == pytest.approx([1.5, 1.0, 0.5])
    cumulative = temperatures(model, **classes, temperature_decay="cumulative")
    assert cumulative == pytest.approx([1.5, 0.75, 0.1875])
    assert temperatures(model, (3, 0), **classes) == pytest.approx([3, 2, 1])
    published = torch.linspace(2, 0.01, 4)[:3].tolist()
    assert temperatures(uvit, **uvit_condition(1)) == pytest.approx(published)


def test_a_grid_that_is_not_square(uvit):
    codes = generate(uvit, **uvit_condition(2), grid=(2, 6), timesteps=3, generator=seeded())
    assert codes.shape == (2, 12) and codes.max() < 60


def test_callback_and_intermediate_draws(model):
    seen = []
    class_ids = torch.tensor([5, 6])
    codes, draws = generate(
        model, class_ids=class_ids, timesteps=4, callback=lambda *given: seen.append(given),
        return_intermediate=True, generator=seeded(),
    )  # fmt: skip
    assert [step for step, _ in seen] == [0, 1, 2, 3] and torch.equal(seen[-1][1], codes)
    assert [int((ids == model.mask_token_id).sum(-1)[0]) for _, ids in seen] == [14, 11, 6, 0]
    assert len(draws) == 4 and all(len(x.unique()) > 5 and x.max() < 60 for x in draws)
    for drawn, (_, ids), (_, after) in zip(draws[1:], seen[:-1], seen[1:], strict=True):
        filled = (ids == model.mask_token_id) & (after != model.mask_token_id)
        assert torch.equal(drawn[filled], after[filled])
    assert torch.equal(codes, generate(model, class_ids=class_ids, timesteps=4, generator=seeded()))


def test_image_to_image_begins_in_the_middle(model):
    codes = torch.randint(0, 60, (2, 16), generator=seeded(1))
    recorder = Recorder(model)
    ids = add_mask_noise(codes, 0.5, model.mask_token_id, seeded())
    drawn = generate(
        recorder, class_ids=torch.tensor([1, 2]), input_ids=ids, timesteps=10, first_step=7
    )
    assert len(recorder.inputs) == 3
    kept = ids != model.mask_token_id
    assert 0 < kept.sum() < kept.numel() and torch.equal(drawn[kept], codes[kept])
    everything = add_mask_noise(codes, 1.0, model.mask_token_id, seeded())
    assert (everything == model.mask_token_id).all()  # strength 1: diffusers masks nothing


@pytest.mark.parametrize("kind", ["class", "uvit"])
def test_compiles_without_breaks_and_recompiles(kind):
    """Three batches, with rows that are alike in the first step: one graph of the trunk."""
    model = class_model() if kind == "class" else uvit_model()
    trunk, ends = CompileCounter(), CompileCounter()
    conditions = [{"class_ids": torch.tensor([c, c, 3])} for c in range(3)]
    if kind == "uvit":
        conditions = [uvit_condition(2) | uvit_negative() | {"seq_len": 16} for _ in range(3)]
    options = dict(guidance_scale=2.0, timesteps=6)
    wanted = [generate(model, **given, **options, generator=seeded()) for given in conditions]
    model.hidden_states = torch.compile(model.hidden_states, backend=trunk, fullgraph=True)
    compiler = partial(torch.compile, backend=ends, fullgraph=True)
    for given, codes in zip(conditions, wanted, strict=True):
        drawn = generate(model, **given, **options, compiler=compiler, generator=seeded())
        assert torch.equal(drawn, codes)
    assert trunk.frame_count == 1
    assert ends.frame_count <= 9  # head, draw, mask: all positions, fewer, and one


def test_least_confident_are_masked():
    probabilities = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    mask = least_confident(torch.tensor([[2]]), probabilities, 0.0)
    assert mask.tolist() == [[False, True, False, True]]


def test_refusals(model, texts, uvit):
    with pytest.raises(ValueError, match=r"class_ids \[10\].*0..9"):
        model.generate(class_ids=torch.tensor([10]))
    with pytest.raises(ValueError, match="nothing to generate from"):
        model.generate()
    with pytest.raises(ValueError, match="cumulativ"):
        model.generate(class_ids=torch.tensor([1]), temperature_decay="cumulativ")
    with pytest.raises(ValueError, match="guidance_schedule='cosin'"):
        model.generate(class_ids=torch.tensor([1]), guidance_scale=2.0, guidance_schedule="cosin")
    with pytest.raises(ValueError, match="first_step=18 of 18"):
        model.generate(class_ids=torch.tensor([1]), first_step=18)
    with pytest.raises(ValueError, match=r"class_ids has the shape \(2,\).*1 or 3"):
        model.generate(class_ids=torch.tensor([1, 2]), rows=3)
    with pytest.raises(ValueError, match=r"negative encoder_hidden_states.*\(1 or 2, 5, 24\)"):
        texts.generate(
            **text_condition(2), negative_embeds=torch.zeros(1, 4, 24), guidance_scale=2.0
        )
    with pytest.raises(ValueError, match="the model has no classes"):
        uvit.generate(class_ids=torch.tensor([1]), **uvit_condition(1))
    with pytest.raises(ValueError, match="guidance needs negative_embeds"):
        uvit.generate(**uvit_condition(2), guidance_scale=2.0)


def test_a_broken_model_is_not_sampled():
    model = class_model()
    torch.nn.init.constant_(model.mlm_layer.mlm_dense.weight, torch.nan)
    with pytest.raises(ValueError, match="predicts NaN"):
        generate(model, class_ids=torch.tensor([1]), timesteps=2)
