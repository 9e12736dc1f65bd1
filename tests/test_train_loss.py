"""The training loss: chunks equal the whole, all logits are never made, nothing is recompiled."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_stage.objective.chunked_loss
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.objective.chunked_loss import linear_cross_entropy, score_chunk
from train_stage.objective.loss import IGNORE, MaskedLoss, masked_loss, token_loss

ROWS, WIDTH, OUTPUTS = 90, 8, 40
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CODES = {**SMALL, "intermediate_size": 48, "codebook_size": 60, "num_vq_tokens": 16}
UVIT = {
    **SMALL, "intermediate_size": 48, "codebook_size": 60, "vocab_size": 64, "in_channels": 16,
    "block_out_channels": (16,), "num_res_blocks": 1, "block_num_heads": 2, "cond_embed_dim": 12,
    "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20, "encoder_hidden_size": 10,
}  # fmt: skip
KINDS = {
    "class": (MaskGitTransformer, {**CODES, "num_classes": 10}),
    "text": (MaskGitTransformer, {**CODES, "add_cross_attention": True, "encoder_hidden_size": 10}),
    "rmsnorm": (MaskGitTransformer, {**CODES, "norm_type": "rmsnorm", "use_mlm_layer": False}),
    "bias": (MaskGitTransformer, {**CODES, "use_bias": True, "use_codebook_size_for_output": True}),
    "patches": (MaskGitTransformer, {**CODES, "use_conv_in_out": True, "patch_size": 2}),
    "uvit": (MaskGiTUViT, UVIT),
    "uvit 512": (MaskGiTUViT, {**UVIT, "force_down_up_sample": True, "use_bias": True}),
}


def make_rows(dtype=torch.float32):
    """features (M, E), weight (V, E), bias (V,), with gradients, and targets (M,)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, WIDTH), (OUTPUTS, WIDTH), (OUTPUTS,)]
    parts = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return *parts, torch.randint(0, OUTPUTS, (ROWS,), generator=generator)


def make_model(kind, **fields):
    """A model with random weights everywhere, without dropout, and its condition for 4 rows."""
    torch.manual_seed(0)
    model_class, kept = KINDS[kind]
    model = model_class(**{**kept, "hidden_dropout": 0.0, "attention_dropout": 0.0, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    condition = {}
    if kind == "text" or model_class is MaskGiTUViT:
        condition = {"encoder_hidden_states": torch.randn(4, 5, 10)}
    if model_class is MaskGiTUViT:
        condition |= {"cond_embeds": torch.randn(4, 12), "micro_conds": 99 * torch.rand(4, 5)}
    return model, condition


def make_batch(share, seed=0):
    """input_ids, labels (4, 16) with about this share scored, and the positions of those."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 60, (4, 16), generator=generator)
    hidden = torch.rand(4, 16, generator=generator) < share
    hidden[:, 0] = True
    labels = torch.where(hidden, codes, IGNORE)
    return torch.where(hidden, 63, codes), labels, hidden.flatten().nonzero().squeeze(-1)


def gradients(module, loss):
    """Gradients of a loss by name of the parameter."""
    module.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [ROWS, 30, 32, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_equal_the_whole(chunk, smoothing, weighted):
    features, weight, bias, targets = make_rows()
    row_weight = torch.rand(ROWS) if weighted else None
    logits = F.linear(features, weight, bias)
    plain = F.cross_entropy(logits, targets, reduction="none")
    losses = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    total = (losses * row_weight).sum() if weighted else losses.sum()
    inputs = (features, weight, bias)
    wanted = torch.autograd.grad(0.7 * total, inputs)
    scores = linear_cross_entropy(*inputs, targets, smoothing, row_weight, chunk)
    torch.testing.assert_close(scores.total, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.losses, losses.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.plain, plain.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.correct, logits.argmax(-1) == targets)
    found = torch.autograd.grad(0.7 * scores.total, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_not_trained_gets_the_same_scores():
    features, weight, bias, targets = make_rows()
    with_gradient = linear_cross_entropy(features, weight, bias, targets, chunk=32)
    with torch.no_grad():
        without = linear_cross_entropy(features, weight, None, targets, chunk=32)
        whole = linear_cross_entropy(features, weight, None, targets)
    assert not torch.equal(without.plain, with_gradient.plain) and not without.total.requires_grad
    torch.testing.assert_close(without, whole)


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


@pytest.mark.parametrize(("chunk", "most"), [(10, ROWS * WIDTH), (30, 30 * OUTPUTS)])
def test_no_more_logits_than_a_chunk_has(chunk, most):
    features, weight, bias, targets = make_rows()
    with Largest() as seen:
        linear_cross_entropy(features, weight, bias, targets, 0.1, chunk=chunk).total.backward()
    assert seen.numbers == most < ROWS * OUTPUTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_scaled_loss(dtype):
    """As far from float32 as the plain way is, for weights in float32 and features in either."""
    results = {}
    for way in ("float32", "whole", "chunks"):
        features, weight, bias, targets = make_rows()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD([weight, bias, features], lr=0.0)
        with torch.autocast("cpu", dtype, enabled=way != "float32"):
            read = F.linear(features, torch.eye(WIDTH)) if way != "float32" else features
            chunk = 32 if way == "chunks" else ROWS
            scores = linear_cross_entropy(read, weight, bias, targets, 0.1, chunk=chunk)
        assert scores.total.dtype == scores.plain.dtype == torch.float32
        scaler.scale(scores.total / ROWS).backward()
        scaler.unscale_(optimizer)
        results[way] = [scores.plain, weight.grad, bias.grad, features.grad]
    step = torch.finfo(dtype).eps
    for exact, whole, chunks in zip(*results.values(), strict=True):
        assert not torch.equal(exact, chunks)
        distance = (whole - exact).norm() + step * exact.norm()
        assert (chunks - exact).norm() < 1.5 * distance < 10 * step * exact.norm()


@pytest.mark.parametrize("chunk_logits", [2**24, 640])  # all at once, ten rows at a time
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_loss_of_forward(kind, chunk_logits, monkeypatch):
    monkeypatch.setattr(train_stage.objective.chunked_loss, "CHUNK_LOGITS", chunk_logits)
    model, condition = make_model(kind)
    input_ids, labels, _ = make_batch(0.5)
    _, plain = model(input_ids, **condition, labels=labels, label_smoothing=0.1)
    wanted = gradients(model, plain)
    loss = model.loss(input_ids, labels, label_smoothing=0.1, **condition)
    found = gradients(model, loss)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    assert found.keys() == wanted.keys() and len(found) == len(list(model.parameters()))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["class", "uvit"])
def test_weights_of_codes(kind, monkeypatch):
    """Codes that are not scored count below the line, as published."""
    monkeypatch.setattr(train_stage.objective.chunked_loss, "CHUNK_LOGITS", 640)
    model, condition = make_model(kind)
    input_ids, labels, _ = make_batch(0.5)
    weight = torch.rand(4, 16)
    logits, plain = model(input_ids, **condition, labels=labels, loss_weight=weight)
    torch.testing.assert_close(plain, token_loss(logits, labels, weight=weight))
    wanted = gradients(model, plain)
    found = gradients(model, model.loss(input_ids, labels, loss_weight=weight, **condition))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_nothing_scored_is_no_number():
    model, _ = make_model("class")
    labels = torch.full((4, 16), IGNORE)
    hidden = model.hidden_states(torch.zeros(4, 16, dtype=torch.long))
    assert masked_loss(model, hidden, labels).isnan() and token_loss(hidden, labels).isnan()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_training_path_is_the_plain_path(kind, checkpointing, monkeypatch):
    monkeypatch.setattr(train_stage.objective.chunked_loss, "CHUNK_LOGITS", 640)
    model, condition = make_model(kind)
    model.train().gradient_checkpointing = checkpointing
    input_ids, labels, positions = make_batch(0.7)
    logits, plain = model(input_ids, **condition, labels=labels, label_smoothing=0.1)
    wanted = gradients(model, plain)
    out = MaskedLoss(model, 0.1)(input_ids, labels, positions, **condition)
    torch.testing.assert_close(out["total"] / len(positions), plain, rtol=1e-5, atol=1e-5)
    targets = labels.flatten()[positions]
    right = logits.flatten(0, 1)[positions].argmax(-1) == targets
    assert torch.equal(out["correct"], right) and len(out["plain"]) == len(positions)
    found = gradients(model, out["total"] / len(positions))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "blocks"), [("text", 1), ("uvit", 3)])
def test_compiled_once_whatever_is_scored(kind, blocks, checkpointing):
    """No graph breaks (fullgraph); one graph a kind of block, for all layers, and one for the loss.

    Three batches of other mask counts add none, and the numbers are those without compilation.
    """
    torch._dynamo.reset()
    counters.clear()
    graphs, lower = [], torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return lower(graph, inputs)

    model, condition = make_model(kind)
    model.train().gradient_checkpointing = checkpointing
    plain, compiled = MaskedLoss(model, 0.1), MaskedLoss(make_model(kind)[0].train(), 0.1)
    compiled.compile_parts(backend)
    compiled.model.gradient_checkpointing = checkpointing
    for seed, share in enumerate((0.1, 0.5, 0.9)):
        batch = make_batch(share, seed)
        wanted, found = (module(*batch, **condition) for module in (plain, compiled))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        wanted, found = gradients(plain, wanted["total"]), gradients(compiled, found["total"])
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)
        assert len(graphs) == blocks + 1
    assert not counters["graph_break"]


def test_a_chunk_alone_can_be_compiled_whole():
    """Several whole chunks, the last one filled up, from one graph."""
    torch._dynamo.reset()
    features, weight, bias, targets = make_rows()
    compiled = torch.compile(score_chunk, backend="aot_eager", fullgraph=True, dynamic=False)
    inputs = (features, weight, bias)
    wanted = linear_cross_entropy(*inputs, targets, 0.1)
    found = linear_cross_entropy(*inputs, targets, 0.1, chunk=32, compiled=compiled)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, inputs), torch.autograd.grad(wanted.total, inputs)
    )
