"""The transformers: attention backends, contexts, checkpointing, compilation, published names."""

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from train_stage.models.attention import attend, check_backend, mask_bias
from train_stage.models.layers import NormStyle
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT

MODELS = {"MaskGitTransformer": MaskGitTransformer, "MaskGiTUViT_v2": MaskGiTUViT}
PUBLISHED = {
    path.stem: published
    for path in sorted((Path(__file__).parent / "data" / "published_keys").glob("*.json"))
    if (published := json.loads(path.read_text()))["class"] in MODELS
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
UVIT = {
    **SMALL,
    "cond_embed_dim": 20,
    "micro_cond_encode_dim": 8,
    "micro_cond_embed_dim": 40,
    "encoder_hidden_size": 24,
    "vocab_size": 72,
    "codebook_size": 64,
    "in_channels": 24,
    "block_out_channels": (24,),
    "num_res_blocks": 1,
    "block_num_heads": 3,
    "intermediate_size": 44,
}
TEXT = {
    **SMALL,
    "codebook_size": 64,
    "num_vq_tokens": 16,
    "intermediate_size": 44,
    "add_cross_attention": True,
    "encoder_hidden_size": 24,
    "project_encoder_hidden_states": True,
}
CLASS = {**SMALL, "codebook_size": 64, "num_vq_tokens": 16, "num_classes": 5}
CONV = {**SMALL, "codebook_size": 64, "num_vq_tokens": 16, "use_conv_in_out": True, "patch_size": 2}
KINDS = ["class", "text", "conv", "uvit", "uvit_down"]


def make(kind, rows=2):
    """A small model in float64 with random weights, input_ids, and its condition."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if kind.startswith("uvit"):
        model = MaskGiTUViT(**UVIT, force_down_up_sample=kind == "uvit_down")
    else:
        fields = {"class": CLASS, "text": TEXT, "conv": CONV}[kind]
        model = MaskGitTransformer(**fields, hidden_dropout=0.0, attention_dropout=0.0)
    with torch.no_grad():  # so that nothing is zero or one by its initialisation
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    codes = torch.randint(0, 64, (rows, 16), generator=generator)
    ids = torch.where(torch.rand(rows, 16, generator=generator) < 0.6, model.mask_token_id, codes)
    if kind == "class":
        ids = torch.cat([torch.full((rows, 1), 66), ids], 1)
    condition = {}
    if kind not in ("class", "conv"):
        condition["encoder_hidden_states"] = torch.randn(rows, 7, 24, generator=generator).double()
        condition["encoder_attention_mask"] = torch.arange(7).expand(rows, 7) < 5
    if kind.startswith("uvit"):
        condition["cond_embeds"] = torch.randn(rows, 20, generator=generator).double()
        condition["micro_conds"] = torch.tensor([[512.0, 512, 0, 0, 6]] * rows)
    return model.double().eval(), ids, condition


@pytest.mark.parametrize("kind", KINDS)
def test_attention_backends_agree(kind):
    model, ids, condition = make(kind)
    model.float()
    condition = {k: v.float() if v.dtype == torch.float64 else v for k, v in condition.items()}
    wanted = model(ids, **condition)
    model.set_attention("plain")
    assert (model(ids, **condition) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.gpu
def test_xformers_agrees_on_a_gpu():
    pytest.importorskip("xformers")
    shape = (2, 64, 4, 32)
    q, k, v = (torch.randn(shape, device="cuda") for _ in range(3))
    bias = mask_bias(torch.arange(64, device="cuda").expand(2, 64) < 50, torch.float32)
    wanted = attend(q, k, v, bias, backend="plain")
    assert torch.allclose(attend(q, k, v, bias, backend="xformers"), wanted, atol=1e-5)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="legal are sdpa, xformers, plain"):
        check_backend("flash")


@pytest.mark.parametrize("kind", ["text", "uvit"])
def test_masked_text_is_not_read(kind):
    model, ids, condition = make(kind)
    wanted = model(ids, **condition)
    condition["encoder_hidden_states"][:, 5:] = 99.0
    assert torch.equal(model(ids, **condition), wanted)
    condition["encoder_hidden_states"][:, 4] = 99.0
    assert not torch.allclose(model(ids, **condition), wanted)
    nothing = torch.zeros_like(condition["encoder_attention_mask"])
    assert model(ids, **condition | {"encoder_attention_mask": nothing}).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_stands_for_the_condition(kind):
    model, ids, condition = make(kind)
    context = model.context(**condition)
    hidden = model.hidden_states(ids, context=context)
    wanted = model.hidden_states(ids, **condition)
    assert torch.equal(hidden, wanted)
    assert torch.equal(model.logits(hidden), model(ids, **condition))


def test_missing_conditions_are_named():
    text, ids, _ = make("text")
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        text(ids)
    uvit, ids, condition = make("uvit")
    with pytest.raises(ValueError, match="4 micro-conditions, the model takes 5"):
        uvit(ids, **condition | {"micro_conds": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="give grid"):
        uvit(ids[:, :8], **condition)


def test_uvit_takes_grids_that_are_not_square():
    model, ids, condition = make("uvit")
    wide = model(ids, **condition, grid=(2, 8))
    assert wide.shape == (2, 16, 64)
    assert not torch.allclose(wide, model(ids, **condition))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing_and_rests_in_eval(kind):
    model, ids, condition = make(kind)

    def step(checkpointing, train):
        model.gradient_checkpointing = checkpointing
        model.train(train).zero_grad()
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(ids, **condition).square().mean()
        loss.backward()
        return kept, loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, loss, grads = step(False, True)
    fewer, same_loss, same_grads = step(True, True)
    assert fewer < plain / 2
    assert torch.equal(loss, same_loss)
    assert all(torch.allclose(a, b) for a, b in zip(grads, same_grads, strict=True))
    assert step(True, False)[0] == step(False, False)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_graph_breaks_or_recompiles(kind):
    model, ids, condition = make(kind)
    torch._dynamo.reset()
    counter = CompileCounter()
    forward = torch.compile(model.__call__, backend=counter, fullgraph=True)
    for shift in range(3):
        batch = ids.roll(shift, 0)
        assert torch.allclose(forward(batch, **condition), model(batch, **condition))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compile_once_for_all(kind):
    model, ids, condition = make(kind)
    torch._dynamo.reset()
    counter = CompileCounter()
    wanted = model(ids, **condition)
    for layer in model.layers():
        layer.compile(backend=counter, fullgraph=True, dynamic=False)
    for _ in range(3):
        assert torch.allclose(model(ids, **condition), wanted)
    kinds = len({type(layer) for layer in model.layers()})
    assert counter.frame_count == kinds
    torch._dynamo.reset()


def test_norms_have_the_parts_they_are_asked_for():
    assert NormStyle("rmsnorm", 1e-6, bias=True).norm(4).bias is None
    assert NormStyle("layernorm", 1e-6, bias=True).norm(4).bias is not None
    assert NormStyle("layernorm", 1e-6, bias=True, affine=False).norm(4).weight is None
    with pytest.raises(ValueError, match="legal are layernorm, rmsnorm"):
        NormStyle("batchnorm", 1e-6).norm(4)


def test_uvit_without_gate_or_affine_norms_or_with_biases():
    for change in ({"use_fused_mlp": True}, {"ln_elementwise_affine": False}, {"use_bias": True}):
        model = MaskGiTUViT(**UVIT, **change).eval()
        _, ids, condition = make("uvit")
        condition = {k: v.float() for k, v in condition.items()}
        assert model(ids, **condition).shape == (2, 16, 64)


def test_first_version_uvits_are_refused():
    with pytest.raises(ValueError, match="first U-ViT"):
        MaskGiTUViT(**UVIT | {"block_out_channels": (128, 256)})
    assert MaskGiTUViT(**UVIT | {"block_num_heads": [3]}).config.block_num_heads == 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(name):
    published = PUBLISHED[name]
    with torch.device("meta"):
        model = MODELS[published["class"]].from_config(published["config"])
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == published["shapes"]
    assert model.mask_token_id == published["config"]["mask_token_id"]


def test_five_published_transformers_are_checked():
    assert len(PUBLISHED) == 5
