"""Critics and self-conditioning in training: against the same steps spelled out with all logits."""

import pytest
import torch
import torch.nn.functional as F
from test_train_noise import CODES, ROWS, K, gradients, make_batch, mask, run, tiny_model

import train_stage.objective.chunked_loss
from train_stage.objective.loss import IGNORE, MaskedLoss
from train_stage.objective.masked_batch import predicts_first
from train_stage.objective.predictions import drawn_codes
from train_stage.training.config import TrainingConfig

SELF = {"critic": "self", "critic_weight": 0.5}
TOKEN = {"critic": "token", "critic_generator": "folder"}


@pytest.mark.parametrize("way", ["self", "token"])
@pytest.mark.parametrize("noise", ["mask", "random_replace"])
def test_the_critic_against_all_logits(way, noise, monkeypatch):
    """Cross-entropy and critic's loss, each a mean, and their gradients. Only hidden codes are
    drawn anew, from the model's own predictions of the K codes, and all N are judged."""
    monkeypatch.setattr(train_stage.objective.chunked_loss, "CHUNK_LOGITS", 640)
    model, codes = tiny_model(critic_head=True), make_batch(ROWS).codes
    generator = tiny_model(num_hidden_layers=2).requires_grad_(False) if way == "token" else None
    masked = mask(model, noise_type=noise, **SELF if way == "self" else TOKEN)
    hidden = mask(model).labels[:, 1:] != IGNORE
    (part,) = masked.split(1)
    logits = (generator or model)(masked.input_ids)  # (B, T, V)
    draw = torch.full((ROWS, CODES), 0.5)
    draw[masked.labels[:, 1:] != IGNORE] = part["draw"]
    cdf = logits[:, 1:, :K].softmax(-1).cumsum(-1)
    drawn = (cdf / cdf[..., -1:] <= draw[..., None]).sum(-1)
    filled = torch.cat([masked.input_ids[:, :1], torch.where(hidden, drawn, codes)], 1)
    judged = model.critic_head(model.hidden_states(filled)[:, 1:]).squeeze(-1)
    critic = F.binary_cross_entropy_with_logits(judged, (filled[:, 1:] == codes).float())
    wanted = critic
    if way == "self":
        weight = part.get("weight", torch.ones(len(part["positions"])))
        targets = masked.labels.flatten()[part["positions"]]
        losses = F.cross_entropy(logits.flatten(0, 1)[part["positions"]], targets, reduction="none")
        wanted = (losses * weight).sum() / weight.sum() + 0.5 * critic
    model.zero_grad()
    wanted.backward()
    expected = gradients(model)
    loss, metrics = run(model, masked, generator=generator)
    torch.testing.assert_close(loss, wanted.detach())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, expected.get(name, torch.zeros_like(gradient)), rtol=1e-4, atol=1e-6
        )
    assert metrics["critic_loss"] == pytest.approx(critic.item(), rel=1e-5)
    right = ((judged > 0) == (filled[:, 1:] == codes)).float().mean().item()
    assert metrics["critic_accuracy"] == pytest.approx(right)
    assert (metrics["loss"] == metrics["critic_loss"]) == (way == "token")


def test_drawn_codes_follow_the_distribution(monkeypatch):
    """Chi-square over 20,000 draws; a code of probability 0 never comes."""
    monkeypatch.setattr(train_stage.objective.chunked_loss, "CHUNK_LOGITS", 640)
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    logits[[0, 7]] = -torch.inf
    draw = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    draw[:2] = torch.tensor([0.0, 1 - 2**-24])
    counts = torch.bincount(
        drawn_codes(torch.zeros(20_000, 1), torch.zeros(8, 1), logits, draw), minlength=7
    )
    expected = 20_000 * logits.softmax(-1)[1:7]
    assert counts[0] == 0 and len(counts) == 7
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 20.5  # 5 degrees, 0.1 %


def test_the_critic_learns():
    """The codes of an image are all alike here: one that differs from its neighbours was drawn."""
    model = tiny_model(critic_head=True, num_classes=None, hidden_size=32)
    generator = tiny_model(num_classes=None).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    accuracy = []
    for step in range(60):
        masked = mask(model, step=step, rows=48, **TOKEN)
        same = (torch.arange(48) % 8)[:, None].expand(48, CODES)
        masked.by_row["codes"] = same
        masked.input_ids = torch.where(masked.labels == IGNORE, same, masked.input_ids)
        metrics = run(model, masked, generator=generator)[1]
        optimizer.step()
        accuracy.append(metrics["critic_accuracy"])
    assert sum(accuracy[-5:]) / 5 > 0.9 > 0.75 > accuracy[0]


def test_self_conditioning_against_all_logits(monkeypatch):
    """One forward pass without gradient, its best codes at hidden places, then the step itself."""
    monkeypatch.setattr(train_stage.objective.chunked_loss, "CHUNK_LOGITS", 640)
    model = tiny_model(self_conditioning=True)
    with torch.no_grad():
        model.embed.previous.weight.normal_()
    masked = mask(model, self_conditioning_prob=1.0)
    scored = masked.labels != IGNORE
    with torch.no_grad():
        first = model(masked.input_ids)[..., :K].argmax(-1)
    previous = torch.where(scored, first, model.mask_token_id)
    _, wanted = model(masked.input_ids, labels=masked.labels, previous=previous)
    _, without = model(masked.input_ids, labels=masked.labels)
    model.zero_grad()
    wanted.backward()
    expected = gradients(model)
    loss, _ = run(model, masked)
    torch.testing.assert_close(loss, wanted.detach())
    assert not torch.isclose(loss, without.detach())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    never = run(model, mask(model, self_conditioning_prob=0.0))[0]
    torch.testing.assert_close(never, without.detach())


def test_codes_that_are_seen_have_no_earlier_prediction():
    """As in sampling, though they are predicted, too."""
    model = tiny_model(self_conditioning=True)
    masked = mask(model, self_conditioning_prob=1.0, predict_all_tokens=True)
    given = []
    model.embed.register_forward_pre_hook(lambda _, args: given.append(args[1]))
    with torch.no_grad():
        first = model(masked.input_ids)[:, 1:, :K].argmax(-1)
    run(model, masked)
    hidden = masked.input_ids[:, 1:] == model.mask_token_id
    assert torch.equal(given[-1][:, 1:], torch.where(hidden, first, model.mask_token_id))
    assert (given[-1][:, 0] == model.mask_token_id).all() and not hidden.all()


def test_half_of_the_steps_condition_on_themselves():
    model, config = tiny_model(self_conditioning=True), TrainingConfig(max_train_steps=1)
    coins = [predicts_first(model, config, 42, step) for step in range(2000)]
    assert 900 < sum(coins) < 1100
    assert coins[:50] != [predicts_first(model, config, 43, step) for step in range(50)]
    assert not predicts_first(tiny_model(), config, 42, coins.index(True))


def test_mixed_precision_keeps_the_gradients_of_the_second_pass():
    """Autocast keeps casts of weights; those made without gradient must not be used again."""
    model = tiny_model(self_conditioning=True, critic_head=True)
    masked = mask(model, self_conditioning_prob=1.0, critic="self")
    run(model, masked)
    exact = gradients(model)
    model.zero_grad()
    (part,) = masked.split(1)
    with torch.autocast("cpu", torch.bfloat16):
        total = MaskedLoss(model)(**part)["total"] / masked.denominator
    total.backward()
    found = gradients(model)
    assert found.keys() == exact.keys()
    for name in exact:
        assert (found[name] - exact[name]).norm() < 0.2 * exact[name].norm() + 1e-4, name
