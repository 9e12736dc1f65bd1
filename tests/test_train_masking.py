"""Masking: counts, positions, schedules; what the loss scores; the dropped condition."""

import math
import random

import pytest
import torch

from train_stage.models.transformer import MaskGitTransformer
from train_stage.objective.buckets import bucket_of
from train_stage.objective.loss import MaskedLoss
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.objective.masking import apply_mask, class_tokens, draw_mask, prepend_token

NAMES = ["cosine", "linear", "arccos", "square", "sqrt", "pow3", "pow0.5", "sigmoid"]


@pytest.mark.parametrize("name", NAMES)
def test_schedules_fall_from_one_to_zero(name):
    ratio = get_mask_schedule(name)(torch.linspace(0, 1, 101))
    assert ratio[0] == pytest.approx(1, abs=1e-5) and ratio[-1] == pytest.approx(0, abs=1e-5)
    assert (ratio.diff() <= 1e-6).all()


def test_schedules_by_hand():
    t = torch.tensor([0.25])
    assert get_mask_schedule("cosine")(t).item() == pytest.approx(math.cos(math.pi / 8))
    assert get_mask_schedule("arccos")(t).item() == pytest.approx(2 / math.pi * math.acos(0.25))
    assert get_mask_schedule("square")(t).item() == pytest.approx(1 - 0.0625)
    assert get_mask_schedule("sqrt")(t).item() == pytest.approx(0.5)
    for wrong in ("cosin", "powx"):
        with pytest.raises(ValueError, match=wrong):
            get_mask_schedule(wrong)


@pytest.mark.parametrize("least", [0.0, 0.4])
def test_exactly_round_ratio_n_codes_are_hidden(least):
    generator = torch.Generator().manual_seed(0)
    draw = draw_mask(500, 64, get_mask_schedule("cosine"), generator, min_masking_rate=least)
    wanted = (64 * draw.ratio).round().clamp(min=1)
    assert torch.equal(draw.mask.sum(-1).float(), wanted)
    assert draw.ratio.min() >= least and draw.ratio.max() > 0.99
    # anywhere: each position is hidden about equally often
    assert draw.mask.float().mean(0).std() < 0.05


def test_rectangles_hold_enough_codes():
    generator = torch.Generator().manual_seed(0)
    draw = draw_mask(
        200, 64, get_mask_schedule("cosine"), generator, 0.0, 1.0, rng=random.Random(0)
    )
    assert (draw.mask.sum(-1) >= (64 * draw.ratio).round()).all()
    for mask in draw.mask.view(-1, 8, 8):
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()


def test_nothing_leaks_and_only_hidden_codes_are_scored():
    codes = torch.randint(0, 60, (50, 16))
    draw = draw_mask(50, 16, get_mask_schedule("linear"))
    input_ids, labels = apply_mask(codes, draw.mask, mask_id=99)
    assert (input_ids[draw.mask] == 99).all() and torch.equal(labels[draw.mask], codes[draw.mask])
    assert torch.equal(input_ids[~draw.mask], codes[~draw.mask])
    assert (labels[~draw.mask] == -100).all()


def test_class_token():
    class_ids, dropped = torch.tensor([3, 3, -1]), torch.tensor([False, True, False])
    token = class_tokens(class_ids, dropped, codebook_size=60, mask_id=99)
    assert token.tolist() == [63, 99, 99]
    ids, labels = prepend_token(torch.zeros(3, 4).long(), torch.ones(3, 4).long(), token)
    assert ids[:, 0].tolist() == [63, 99, 99] and (labels[:, 0] == -100).all()
    assert class_ids.tolist() == [3, 3, -1]


def test_dropout_keeps_what_it_should():
    """0.1 keeps 90 % of the conditions; the reference keeps 10 %."""
    from test_train_objective import masked_classes

    kept = masked_classes(cond_dropout_prob=0.1, rows=20_000)
    assert kept == pytest.approx(0.9, abs=0.01)
    assert masked_classes(cond_dropout_prob=0.0, rows=1000) == 1.0
    assert masked_classes(cond_dropout_prob=1.0, rows=1000) == 0.0


def test_the_loss_module_agrees_with_forward():
    """Head on scored codes only, summed: the plain path's mean times the count, gradients too."""
    torch.manual_seed(0)
    model = MaskGitTransformer(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        codebook_size=60, num_vq_tokens=16, num_classes=10,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    ids = torch.randint(0, 60, (8, 17))
    labels = torch.where(torch.rand(8, 17) < 0.4, torch.randint(0, 60, (8, 17)), -100)
    _, loss = model(ids, labels=labels, label_smoothing=0.1)
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    positions = (labels != -100).flatten().nonzero().squeeze(-1)
    out = MaskedLoss(model, label_smoothing=0.1)(ids, labels, positions)
    torch.testing.assert_close(out["losses"].sum(), out["total"].detach())
    mean = out["total"] / len(positions)
    mean.backward()
    assert mean.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-7)


def test_buckets():
    shares = torch.tensor([0.05, 0.1, 0.11, 0.5, 0.95, 1.0])
    assert bucket_of(shares).tolist() == [0, 0, 1, 4, 9, 9]
