"""Soft targets and entropies, without the tensors that they would fill: against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from test_train_loss import OUTPUTS, ROWS, WIDTH, Largest, make_rows
from test_train_noise import CODES, K, gradients, mask, run, tiny_model, topk

import train_stage.objective.chunked_loss
from train_stage.objective.chunked_loss import linear_cross_entropy, score_chunk
from train_stage.objective.loss import IGNORE
from train_stage.objective.predictions import best_codes, entropies
from train_stage.objective.soft_targets import (
    codebook_targets,
    drawn_targets,
    stored_targets,
    topk_columns,
)


def make_soft(k=5):
    """(M, k) codes without repetition and their shares, and the same as (M, V)."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(ROWS, OUTPUTS, generator=generator).argsort(-1)[:, :k]
    shares = torch.rand(ROWS, k, generator=generator).softmax(-1)
    return (ids, shares), torch.zeros(ROWS, OUTPUTS).scatter(-1, ids, shares)


@pytest.mark.parametrize(
    ("chunk", "smoothing", "compiled"),
    [(ROWS, 0.0, False), (ROWS, 0.1, False), (32, 0.0, False), (1, 0.1, False), (32, 0.1, True)],
)
def test_chunks_equal_the_whole(chunk, smoothing, compiled):
    """F.cross_entropy takes whole distributions, and smooths them itself."""
    features, weight, bias, targets = make_rows()
    soft, whole = make_soft()
    row_weight, inputs = torch.rand(ROWS), (features, weight, bias)
    logits = F.linear(*inputs)
    losses = F.cross_entropy(logits, whole, label_smoothing=smoothing, reduction="none")
    wanted = torch.autograd.grad(0.7 * (losses * row_weight).sum(), inputs)
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": False}
    score = torch.compile(score_chunk, **options) if compiled else None
    scores = linear_cross_entropy(*inputs, targets, smoothing, row_weight, chunk, score, soft)
    torch.testing.assert_close(scores.losses, losses.detach(), rtol=1e-5, atol=1e-5)
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(scores.plain, plain.detach(), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(0.7 * scores.total, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_nothing_as_large_as_the_distributions():
    features, weight, bias, targets = make_rows()
    soft, _ = make_soft()
    with Largest() as seen:
        found = linear_cross_entropy(features, weight, bias, targets, 0.1, chunk=10, soft=soft)
        found.total.backward()
    assert seen.numbers == ROWS * WIDTH < ROWS * OUTPUTS


@pytest.mark.parametrize("classes", [10, None])
@pytest.mark.parametrize("kind", ["stored", "recomputed"])
def test_the_step_against_all_logits(kind, classes, monkeypatch):
    """Over the K codes only, as published; targets sum to one; gradients of all parameters.

    The reference drops position 0 always: without a class token that is a code, which counts here.
    """
    monkeypatch.setattr(train_stage.objective.chunked_loss, "CHUNK_LOGITS", 640)
    model, table, first = tiny_model(num_classes=classes), None, int(bool(classes))
    if kind == "stored":
        masked = mask(model, soft_targets="stored")
        columns = topk()
        ids, shares = columns["topk_codes"].long(), columns["topk_weights"].float()
        shares = shares / shares.sum(-1, keepdim=True)
    else:
        masked = mask(model, soft_targets="recomputed")
        table = codebook_targets(torch.randn(K, 3), 1.0, 4)
        codes = masked.labels[:, first:].clamp(min=0)
        ids, shares = table[0][codes], table[1][codes]
    whole = torch.zeros(*ids.shape[:2], K).scatter(-1, ids, shares)
    logits = model(masked.input_ids)[:, first:, :K]
    scored = masked.labels[:, first:] != IGNORE
    losses = -(whole * logits.log_softmax(-1)).sum(-1)[scored]
    model.zero_grad()
    (0.9 * losses - 0.1 * logits.log_softmax(-1).mean(-1)[scored]).mean().backward()
    wanted = gradients(model)
    loss, _ = run(model, masked, soft_table=table, label_smoothing=0.1)
    expected = (0.9 * losses - 0.1 * logits.log_softmax(-1).mean(-1)[scored]).mean().detach()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_stored_targets_are_those_of_the_scored_codes():
    columns, scored = topk(rows=3), torch.rand(3, CODES) < 0.5
    found = stored_targets(columns, scored)
    rows, places = scored.nonzero().unbind(-1)
    assert torch.equal(found["soft_ids"], columns["topk_codes"][rows, places].long())
    torch.testing.assert_close(found["soft_weights"].sum(-1), torch.ones(int(scored.sum())))
    assert topk_columns("codes_f8") == ("topk_codes_f8", "topk_weights_f8")


def test_codes_drawn_from_stored_targets():
    """Each step draws others, by their weights; what is hidden stays what it would be."""
    columns = topk(rows=1, k=3)
    draw = torch.rand(3000, 1, CODES, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([drawn_targets(columns, u) for u in draw])  # (3000, 1, N)
    shares = (drawn[..., None] == columns["topk_codes"].long()).float().mean(0)
    weights = columns["topk_weights"].float()
    wanted = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(shares, wanted, atol=0.05, rtol=0)
    model, plain = tiny_model(), mask(tiny_model())
    masked = mask(model, soft_targets="stored", use_stochastic_code=True)
    assert torch.equal(masked.labels == IGNORE, plain.labels == IGNORE)
    seen = torch.where(masked.labels == IGNORE, masked.input_ids, masked.labels)[:, 1:]
    assert (seen[..., None] == topk()["topk_codes"].long()).any(-1).all()


def test_recomputed_targets_by_hand():
    """Each code is its own nearest; all K of them are the softmax of get_soft_code."""
    codebook = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    ids, weights = codebook_targets(codebook, 0.5, 50)
    distance = (codebook[:, None] - codebook[None]).square().sum(-1)
    whole = torch.zeros(50, 50).scatter(-1, ids, weights)
    torch.testing.assert_close(whole, (-distance / 0.5).softmax(-1))
    assert torch.equal(ids[:, 0], torch.arange(50))
    few = codebook_targets(codebook, 0.5, 3)
    assert torch.equal(few[0], ids[:, :3])
    torch.testing.assert_close(few[1], weights[:, :3] / weights[:, :3].sum(-1, keepdim=True))
    cold = codebook_targets(codebook, 1e-6, 3)[1]
    torch.testing.assert_close(cold[:, 0], torch.ones(50))


@pytest.mark.parametrize("options", [{}, {"noise_type": "random_replace"}])
def test_entropies_in_the_log(options, monkeypatch):
    """Each image's, from all logits of its hidden codes; averaged by bucket; in nats."""
    monkeypatch.setattr(train_stage.objective.chunked_loss, "CHUNK_LOGITS", 640)
    model = tiny_model()
    hidden = mask(model).labels[:, 1:] != IGNORE
    masked = mask(model, log_entropy_every=2, **options)
    probabilities = model(masked.input_ids)[:, 1:].detach().softmax(-1)
    token, image = [], []
    for p, chosen in zip(probabilities, hidden, strict=True):
        token.append(torch.special.entr(p[chosen]).sum(-1).mean())
        image.append(torch.special.entr(p[chosen].mean(0)).sum())
    share, metrics = hidden.float().mean(-1), run(model, masked, passes=2)[1]
    for name, values in (("token", token), ("image", image)):
        for low in range(10):
            rows = (share > low / 10 + 1e-6) & (share <= (low + 1) / 10 + 1e-6)
            key = f"entropy_{name}_masked_{10 * low}_{10 * low + 10}"
            assert (key in metrics) == bool(rows.any())
            if rows.any():
                wanted = torch.stack(values)[rows].mean().item()
                assert metrics[key] == pytest.approx(wanted, rel=1e-4)
    other = run(model, mask(model, step=1, log_entropy_every=2, **options))[1]
    assert not any(name.startswith("entropy") for name in other)


def test_entropies_of_what_is_known(monkeypatch):
    """ln V where nothing is known, 0 where all is; two certain codes that differ: ln 2 together."""
    monkeypatch.setattr(train_stage.objective.chunked_loss, "CHUNK_LOGITS", 8)
    logits = torch.zeros(4, 8)
    logits[2, 1] = logits[3, 5] = 100.0
    image = torch.tensor([0, 0, 1, 1])
    token, average = entropies(logits, torch.eye(8), None, image, 2)
    ln = torch.tensor([8.0, 1.0]).log(), torch.tensor([8.0, 2.0]).log()
    torch.testing.assert_close(token, ln[0])
    torch.testing.assert_close(average, ln[1])
    assert torch.equal(best_codes(logits, torch.eye(8), None)[2:], torch.tensor([1, 5]))
