"""Parallel decoding: what is kept, how many codes settle, temperature, guidance, refusals."""

import pytest
import torch

from train_stage.sampling import generate, mask_by_random_topk
from train_stage.transformer import MaskGitTransformer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MaskGitTransformer(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        codebook_size=60, num_vq_tokens=16, num_classes=10,
    ).eval()  # fmt: skip


def seeded(number=0):
    return torch.Generator().manual_seed(number)


class Recorder:
    """A model that remembers what it was given."""

    def __init__(self, model):
        self.model, self.config, self.inputs = model, model.config, []
        self.mask_token_id = model.mask_token_id

    def __call__(self, ids):
        self.inputs.append(ids.clone())
        return self.model(ids)


def test_codes_only_and_seeded(model):
    class_ids = torch.tensor([1, 2, 3, 4])
    codes = model.generate(class_ids=class_ids, generator=seeded())
    assert codes.shape == (4, 16) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 60
    assert torch.equal(codes, model.generate(class_ids=class_ids, generator=seeded()))
    assert not torch.equal(codes, model.generate(class_ids=class_ids, generator=seeded(1)))
    assert class_ids.tolist() == [1, 2, 3, 4]  # the reference adds the codebook size in place


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


def test_inpainting_keeps_what_is_known(model):
    given = torch.randint(0, 60, (3, 16))
    known = torch.rand(3, 16) < 0.5
    ids = torch.where(known, given, model.mask_token_id)
    codes = generate(model, class_ids=torch.tensor([0, 1, 2]), input_ids=ids, generator=seeded())
    assert torch.equal(codes[known], given[known]) and codes.max() < 60


def test_a_row_without_masks_stays_as_it_is(model):
    given = torch.randint(0, 60, (2, 16))
    ids = given.clone()
    ids[0] = model.mask_token_id
    codes = generate(model, class_ids=torch.tensor([0, 1]), input_ids=ids, generator=seeded())
    assert torch.equal(codes[1], given[1])


def test_without_condition(model):
    codes = generate(model, rows=3, guidance_scale=3.0, timesteps=3, generator=seeded())
    assert codes.shape == (3, 16) and codes.max() < 60


def test_temperature_is_the_closed_form(model, monkeypatch):
    """temperature * (1 - r); the reference multiplies it up step by step."""
    import train_stage.sampling as sampling

    used = []
    real = mask_by_random_topk

    def spy(mask_len, probabilities, temperature, generator):
        used.append(temperature)
        return real(mask_len, probabilities, temperature, generator)

    monkeypatch.setattr(sampling, "mask_by_random_topk", spy)
    generate(model, class_ids=torch.tensor([1]), temperature=2.0, timesteps=4)
    assert used == pytest.approx([1.5, 1.0, 0.5])
    used.clear()
    generate(
        model, class_ids=torch.tensor([1]), temperature=2.0, timesteps=4,
        temperature_decay="cumulative",
    )  # fmt: skip
    assert used == pytest.approx([1.5, 0.75, 0.1875])


def test_guidance_zero_and_one_are_the_conditional_model(model):
    class_ids = torch.tensor([1, 2])
    plain = generate(model, class_ids=class_ids, guidance_scale=0.0, generator=seeded())
    one = generate(model, class_ids=class_ids, guidance_scale=1.0, generator=seeded())
    assert torch.equal(plain, one)
    fraction = generate(model, class_ids=class_ids, guidance_scale=2.5, generator=seeded())
    assert fraction.shape == plain.shape


def test_guidance_uses_the_mask_id_as_no_class(model):
    recorder = Recorder(model)
    generate(recorder, class_ids=torch.tensor([3, 4]), guidance_scale=2.0, timesteps=2)
    first = recorder.inputs[0][:, 0].tolist()
    assert first == [63, 64, model.mask_token_id, model.mask_token_id]


def test_topk_masks_the_least_confident():
    probabilities = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    mask = mask_by_random_topk(torch.tensor([[2]]), probabilities, temperature=0.0)
    assert mask.tolist() == [[False, True, False, True]]


def test_refusals(model):
    with pytest.raises(ValueError, match=r"class_ids \[10\].*0..9"):
        model.generate(class_ids=torch.tensor([10]))
    with pytest.raises(ValueError, match="nothing to generate from"):
        model.generate()
    with pytest.raises(ValueError, match="cumulativ"):
        model.generate(class_ids=torch.tensor([1]), temperature_decay="cumulativ")
