"""Self-conditioning, the critic's head and the learned null text: off, fresh, trained, compiled."""

import pytest
import torch
from small_models import CODES, SIZES, TEXT, UVIT, seeded, text_condition, uvit_condition
from torch._dynamo.testing import CompileCounter

from train_stage.models.amused import save_amused_transformer
from train_stage.models.load_transformer import load_transformer
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT

FIELDS = {
    "class": CODES | {"num_classes": 10},
    "text": CODES | TEXT,
    "conv": CODES | {"use_conv_in_out": True, "patch_size": 2, "embedding_size": 20},
    "uvit": UVIT,
}
KINDS = list(FIELDS)
READS_TEXT = ["text", "uvit"]


def make(kind, shaken=False, **options):
    """A model, fresh or with every parameter moved from where it starts."""
    torch.manual_seed(0)
    cls = MaskGiTUViT if kind == "uvit" else MaskGitTransformer
    model = cls(**SIZES, **FIELDS[kind], hidden_dropout=0.0, attention_dropout=0.0, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * shaken * torch.randn(parameter.shape, generator=seeded(1))
    return model.eval()


def extended(kind, shaken=False):
    null = {"null_text_length": 3} if kind in READS_TEXT else {}
    return make(kind, shaken, self_conditioning=True, critic_head=True, **null)


def inputs(kind, model, rows=3):
    """input_ids, half of them hidden, and a condition."""
    ids = torch.randint(0, 60, (rows, 16), generator=seeded(2))
    ids = ids.masked_fill(torch.rand(ids.shape, generator=seeded(3)) < 0.5, model.mask_token_id)
    if kind == "class":
        ids = torch.cat([torch.full((rows, 1), 61), ids], 1)
    condition = {"text": text_condition, "uvit": uvit_condition}.get(kind, lambda rows: {})(rows)
    return ids, {name: x.expand(rows, *x.shape[1:]) for name, x in condition.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_off_by_default_and_refused(kind):
    model = make(kind)
    ids, condition = inputs(kind, model)
    names = {*model.state_dict(), *model.config_dict()}
    assert not [name for name in names if "previous" in name or "critic" in name or "null" in name]
    assert "self_conditioning" not in names
    with pytest.raises(ValueError, match="self_conditioning=false"):
        model(ids, **condition, previous=ids)
    with pytest.raises(ValueError, match="critic_head=false"):
        model.critic(torch.zeros(2, 32))
    if condition:
        with pytest.raises(ValueError, match="null_text_length=null"):
            model(ids, **condition, dropped=torch.zeros(3, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
def test_self_conditioning_changes_nothing_until_it_has_learned(kind):
    fresh, model = extended(kind), extended(kind, shaken=True)
    ids, condition = inputs(kind, fresh)
    previous = ids.roll(1, 0)
    assert torch.equal(fresh(ids, **condition, previous=previous), fresh(ids, **condition))
    nothing = torch.full_like(ids, model.mask_token_id)
    without = model(ids, **condition)
    assert torch.equal(model(ids, **condition, previous=nothing), without)
    assert not torch.allclose(model(ids, **condition, previous=previous), without)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient_whatever_a_batch_holds(kind, checkpointing):
    model = extended(kind, shaken=True).train()
    model.gradient_checkpointing = checkpointing
    ids, condition = inputs(kind, model)
    hidden = model.hidden_states(ids, **condition)
    assert model.critic(hidden).shape == ids.shape
    (model.logits(hidden).square().mean() + model.critic(hidden).mean()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_the_map_of_a_fresh_model_learns():
    model = extended("class").train()
    ids, _ = inputs("class", model)
    model(ids, previous=ids.roll(1, 0)).square().mean().backward()
    assert model.embed.previous.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["class", "uvit"])
def test_extended_models_compile_once(kind):
    model = extended(kind, shaken=True)
    ids, condition = inputs(kind, model)
    options = condition | {"previous": ids.roll(1, 0)}
    if condition:
        options["dropped"] = torch.tensor([False, True, False])
    counter = CompileCounter()
    compiled = torch.compile(model.hidden_states, backend=counter, fullgraph=True)
    for shift in range(3):
        batch = ids.roll(shift, 0)
        wanted = model.hidden_states(batch, **options)
        assert torch.allclose(compiled(batch, **options), wanted, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", READS_TEXT)
@pytest.mark.parametrize("positions", [2, 3, 5])  # shorter than the null text, as long, longer
@pytest.mark.parametrize("masked", [False, True])
def test_a_dropped_row_reads_the_null_text_and_no_other_does(kind, positions, masked):
    model, plain = extended(kind, shaken=True), make(kind)
    fewer = plain.state_dict().keys()
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if name in fewer})
    model.embed.previous.weight.data.zero_()
    ids, condition = inputs(kind, model)
    condition["encoder_hidden_states"] = condition["encoder_hidden_states"][:, :positions]
    if masked:
        condition["encoder_attention_mask"] = torch.arange(positions).expand(3, -1) < 2
    dropped = torch.tensor([False, True, False])
    logits = model(ids, **condition, dropped=dropped)
    wanted = plain(ids, **condition)
    torch.testing.assert_close(logits[::2], wanted[::2])
    null = {"encoder_hidden_states": model.null_text.expand(3, -1, -1)}
    if kind == "uvit":
        null["cond_embeds"] = model.null_pooled.expand(3, -1)
        null["micro_conds"] = condition["micro_conds"]
    torch.testing.assert_close(logits[1], plain(ids, **null)[1])
    context = model.context(**condition, dropped=dropped)
    torch.testing.assert_close(model.logits(model.hidden_states(ids, context=context)), logits)
    torch.testing.assert_close(model(ids, **condition), wanted)  # nothing is dropped


@pytest.mark.parametrize("kind", KINDS)
def test_extended_models_are_saved_and_opened_strictly(kind, tmp_path):
    model = extended(kind, shaken=True)
    model.save_pretrained(tmp_path / "model")
    opened = load_transformer(tmp_path / "model")
    ids, condition = inputs(kind, model)
    wanted = model(ids, **condition, previous=ids.roll(1, 0))
    assert torch.equal(opened(ids, **condition, previous=ids.roll(1, 0)), wanted)
    with pytest.raises(ValueError, match="missing embed.previous.weight"):
        type(model).from_state(model.config_dict(), make(kind).state_dict(), "a plain model")


def test_diffusers_has_no_such_models(tmp_path):
    with pytest.raises(ValueError, match="UVit2DModel has no self_conditioning=True, only False"):
        save_amused_transformer(extended("uvit"), tmp_path / "model")


def test_null_texts_that_cannot_be():
    with pytest.raises(ValueError, match="null_text_length=0: legal are null, 1 or more"):
        make("text", null_text_length=0)
    with pytest.raises(ValueError, match="set add_cross_attention"):
        make("class", null_text_length=4)
