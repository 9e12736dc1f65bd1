"""Training options of what is hidden, scored and weighted: counts, draws, and plain formulas."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train_loss import UVIT
from test_train_objective import COSINE, make_batch

from configs.load import ConfigError
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.objective.loss import IGNORE, MaskedLoss
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.objective.masked_batch import mask_batch
from train_stage.objective.masking import draw_mask, stratified_uniform
from train_stage.objective.soft_targets import stored_targets
from train_stage.objective.sums import Sums, describe_sums
from train_stage.training.config import TrainingConfig

ROWS, CODES, K = 24, 16, 60
OPTIONS = {
    "rectangles": {"mask_contiguous_region_prob": 0.7},
    "random codes": {"noise_type": "random_replace"},
    "all": {"predict_all_tokens": True, "min_masking_rate": 0.2},
    "stratified": {"stratified_mask_ratios": True},
    "stored": {"soft_targets": "stored", "label_smoothing": 0.1},
    "random, stored": {"soft_targets": "stored", "noise_type": "random_replace"},
    "drawn": {"soft_targets": "stored", "use_stochastic_code": True},
    "entropy": {"log_entropy_every": 1},
    "self-critic": {"critic": "self", "critic_weight": 0.5, "predict_all_tokens": True},
    "token-critic": {"critic": "token", "critic_generator": "folder"},
    "self-conditioning": {"self_conditioning_prob": 1.0},
}  # fmt: skip


def extensions(name):
    """What the model must have for the option of that name."""
    return {"critic_head": "critic" in name, "self_conditioning": name == "self-conditioning"}


def tiny_model(**fields):
    torch.manual_seed(0)
    given = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "codebook_size": K, "num_vq_tokens": CODES, "num_classes": 10,
        "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    model = MaskGitTransformer(**given | fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def topk(rows=ROWS, k=4):
    """Columns of soft targets, as a store has them."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(rows, CODES, K, generator=generator).argsort(-1)[..., :k].to(torch.uint16)
    weights = torch.rand(rows, CODES, k, generator=generator).half()
    return {"topk_codes": ids, "topk_weights": weights}


def mask(
    model, rank=0, world=1, step=0, rows=ROWS, grid=None, device="cpu", conditioner=None, **options
):
    """This process's part of a global batch of `rows`."""
    part = slice(rank * rows // world, (rank + 1) * rows // world)
    batch = make_batch(rows, step, part)
    batch.columns = {name: values[part] for name, values in topk(rows).items()}
    config = TrainingConfig(max_train_steps=1, **options)
    where = torch.device(device)
    return mask_batch(batch, model, config, 42, COSINE, rank, world, where, conditioner, grid)


def run(model, masked, passes=1, **options):
    """(total / denominator with its gradient taken, metrics) of a masked batch."""
    sums, loss = Sums.zeros(masked.input_ids.device), 0
    module = MaskedLoss(model, **options)
    model.zero_grad()
    for part in masked.split(passes):
        out = module(**part)
        (out["total"] / masked.denominator).backward()
        loss += out["total"].detach() / masked.denominator
        sums.add(out)
    return loss, describe_sums(sums.flat().tolist()) if loss.device.type == "cpu" else {}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", OPTIONS)
def test_any_number_of_processes_and_passes_is_the_same_step(name):
    """The same draws for 1 process and 3, for 1 pass and 2: the same loss and gradients."""
    options, model = OPTIONS[name], tiny_model(**extensions(name))
    kept = {"generator": tiny_model().requires_grad_(False)} if "token" in name else {}
    kept["label_smoothing"] = options.get("label_smoothing", 0.0)
    whole = mask(model, **options)
    loss, metrics = run(model, whole, **kept)
    wanted = gradients(model)
    total, found = 0, []
    for rank in range(3):
        part = mask(model, rank, 3, **options)
        assert part.denominator == whole.denominator
        total += run(model, part, passes=2, **kept)[0]
        found.append(gradients(model))
    torch.testing.assert_close(total, loss)
    assert len(wanted) == len(list(model.parameters())), "a wrapper waits for every gradient"
    for key in wanted:
        torch.testing.assert_close(sum(g[key] for g in found), wanted[key], rtol=1e-4, atol=1e-6)
    again = mask(model, step=1, **options)
    assert not torch.equal(again.input_ids, whole.input_ids)
    assert metrics["loss"] > 0 and 0 <= metrics["accuracy"] <= 1


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_asks_the_device_for_anything(name):
    """See test_a_step_asks_the_device_for_nothing: values that a GPU is waited for raise here."""
    device, fields = torch.device("meta"), extensions(name)
    kept = {"generator": tiny_model().to(device)} if "token" in name else {}
    if name == "stored":
        kept["soft_table"] = tuple(values[0].to(device) for values in topk().values())
    run(tiny_model(**fields).to(device), mask(tiny_model(**fields), device="meta", **OPTIONS[name]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_waits_for_a_gpu(name):
    device = torch.device("cuda")
    model = tiny_model(**extensions(name)).to(device)
    kept = {"generator": tiny_model().to(device)} if "token" in name else {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(model, mask(model, device="cuda", **OPTIONS[name]), **kept)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_random_codes_stand_where_codes_are_hidden():
    """The reference never gets there. Visible codes stay, hidden ones are uniform over all K."""
    model = tiny_model()
    masked = mask(model, rows=600, noise_type="random_replace", cond_dropout_prob=0.0)
    plain = mask(model, rows=600, cond_dropout_prob=0.0)
    ids, codes = masked.input_ids[:, 1:], make_batch(600).codes
    hidden = plain.labels[:, 1:] != IGNORE
    assert torch.equal(ids[~hidden], codes[~hidden])
    counts = torch.bincount(ids[hidden], minlength=K)
    assert (
        len(counts) == K
        and (counts - counts.float().mean()).abs().max() < 6 * counts.float().mean() ** 0.5
    )
    assert torch.equal(masked.labels[:, 1:], codes) and (masked.labels[:, 0] == IGNORE).all()


def test_all_codes_are_predicted_with_their_weights():
    """Against all logits: sum of weighted losses over the sum of weights; log of hidden codes."""
    model = tiny_model()
    masked = mask(model, predict_all_tokens=True)
    plain = mask(model)
    hidden = plain.labels[:, 1:] != IGNORE
    assert torch.equal(masked.input_ids, plain.input_ids)
    logits = model(masked.input_ids)[:, 1:]
    codes = make_batch(ROWS).codes
    losses = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")  # (B, N)
    (part,) = masked.split(1)
    weight = part["weight"].view(ROWS, CODES)
    assert (weight[hidden] == 1).all() and (weight[~hidden] < 1).all() and weight.min() >= 0.3
    wanted = (losses * weight).sum() / weight.sum()
    model.zero_grad()
    wanted.backward()
    expected = gradients(model)
    loss, metrics = run(model, masked)
    torch.testing.assert_close(loss, wanted.detach())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert metrics["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert metrics["cross_entropy"] == pytest.approx(losses[hidden].mean().item(), rel=1e-5)
    assert metrics["loss_visible"] == pytest.approx(losses[~hidden].mean().item(), rel=1e-5)


@pytest.mark.parametrize("noise", ["mask", "random_replace"])
def test_loss_by_mask_ratio(noise):
    model = tiny_model()
    hidden = mask(model).labels[:, 1:] != IGNORE
    masked = mask(model, noise_type=noise)
    logits = model(masked.input_ids)[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), make_batch(ROWS).codes, reduction="none")
    share = hidden.float().mean(-1)
    metrics = run(model, masked)[1]
    for low in range(10):
        rows = (share > low / 10 + 1e-6) & (share <= (low + 1) / 10 + 1e-6)
        name = f"loss_masked_{10 * low}_{10 * low + 10}"
        assert (name in metrics) == bool(rows.any())
        if rows.any():
            wanted = losses[rows][hidden[rows]].mean().item()
            assert metrics[name] == pytest.approx(wanted, rel=1e-5)


def test_rectangles_of_a_wide_grid():
    generator = torch.Generator().manual_seed(0)
    draw = draw_mask(300, 48, COSINE, generator, 0.0, 1.0, rng=random.Random(0), grid=(4, 12))
    assert (draw.mask.sum(-1) >= (48 * draw.ratio).round()).all()
    shapes = set()
    for rectangle in draw.mask.view(-1, 4, 12):
        height, width = rectangle.any(1).sum(), rectangle.any(0).sum()
        assert rectangle.sum() == height * width
        shapes.add((int(height), int(width)))
    assert len(shapes) > 15 and (4, 12) in shapes
    model = tiny_model(num_classes=None)
    masked = mask(model, grid=(2, 8), mask_contiguous_region_prob=1.0)
    for rectangle in (masked.labels != IGNORE).view(-1, 2, 8):
        assert rectangle.sum() == rectangle.any(1).sum() * rectangle.any(0).sum()


def test_stratified_ratios_vary_less_and_mean_the_same():
    """Exactly one u in each cell; each row's u is uniform; the batch's mean hardly varies."""
    generator = torch.Generator().manual_seed(0)
    draws = [stratified_uniform(torch.rand(32, generator=generator), generator) for _ in range(500)]
    for u in draws[:20]:
        assert torch.equal((u * 32).floor().sort().values, torch.arange(32.0))
    first = np.sort([u[0].item() for u in draws])  # Kolmogorov-Smirnov, 0.1 % level
    assert np.abs(first - (np.arange(500) + 0.5) / 500).max() < 1.95 / 500**0.5
    means = {
        way: np.var([draw_mask(32, 16, COSINE, generator, stratified=way).ratio.mean().item()
                     for _ in range(300)])
        for way in (False, True)
    }  # fmt: skip
    assert means[True] < means[False] / 100
    ratios = torch.cat([draw_mask(32, 16, COSINE, generator, stratified=True).ratio
                        for _ in range(300)])  # fmt: skip
    assert ratios.mean().item() == pytest.approx(2 / np.pi, abs=1e-3)


def test_fixed_ratio_of_a_schedule():
    """What the validation loss at fixed ratios is taken with."""
    draw = draw_mask(50, 64, lambda t: torch.full_like(t, 0.25), torch.Generator())
    assert (draw.mask.sum(-1) == 16).all()
    assert get_mask_schedule("cosine")(torch.tensor(0.0)) == 1


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="topk_codes.*the batch has caption.*recomputed"):
        stored_targets({"caption": torch.zeros(1)}, torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ConfigError, match="critic=token and a generator"):
        TrainingConfig(max_train_steps=1, critic="token")
    with pytest.raises(ConfigError, match="soft_code_temp=0"):
        TrainingConfig(max_train_steps=1, soft_code_temp=0.0)
    with pytest.raises(ValueError, match="mask_contiguous_region_prob=1.5: legal are 0 to 1"):
        TrainingConfig(max_train_steps=1, mask_contiguous_region_prob=1.5)
    with pytest.raises(ConfigError, match="give training.soft_targets=stored"):
        TrainingConfig(max_train_steps=1, use_stochastic_code=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_unet_with_text_on_a_wide_grid(name):
    """What the conditioner says goes to the model, every pass gets its rows of it."""
    torch.manual_seed(0)
    model = MaskGiTUViT(**UVIT, **extensions(name))
    texts = {
        "encoder_hidden_states": torch.randn(ROWS, 5, 10),
        "cond_embeds": torch.randn(ROWS, 12),
        "micro_conds": 99 * torch.rand(ROWS, 5),
    }
    asked = []

    def conditioner(batch, dropped):
        asked.append(dropped)
        return {key: values * ~dropped.view(-1, *[1] * (values.ndim - 1))
                for key, values in texts.items()}  # fmt: skip

    kept = {"generator": MaskGiTUViT(**UVIT).requires_grad_(False)} if "token" in name else {}
    options = OPTIONS[name] | {"conditioner": conditioner, "grid": (2, 8)}
    whole = run(model, mask(model, **options), grid=(2, 8), **kept)[0]
    wanted = gradients(model)
    parts = run(model, mask(model, **options), passes=4, grid=(2, 8), **kept)[0]
    torch.testing.assert_close(parts, whole)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-6)
    assert asked[0].shape == (ROWS,) and torch.equal(*asked)
