"""What count_step counts without data, against real steps, real memory and a GPU's rules."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from train_stage.models.sizes import condition_shapes
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.objective.loss import MaskedLoss
from train_stage.training import step_cost
from train_stage.training.step_cost import (
    AUTOCAST,
    Ledger,
    Step,
    autocast,
    count_step,
    like_gpu,
    make_inputs,
    no_data,
)

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 192,
    "num_vq_tokens": 64,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
STEP = Step(rows=4, length=64, scored=150)


def make_model(model=MaskGitTransformer, device="meta", checkpointing=False, **fields):
    with torch.device(device):
        model = model(**SMALL | fields)
    model.gradient_checkpointing = checkpointing
    return model.train()


def cost(step=STEP, device="cpu", model=MaskGitTransformer, **fields):
    return count_step(make_model(model, **fields), step, device)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_pass_costs_the_same(precision, checkpointing):
    """The same operations by torch's own counter, and the same bytes in tensors that have data."""
    step = Step(**vars(STEP) | {"precision": precision})
    counted = cost(step, checkpointing=checkpointing)
    with Ledger() as ledger:
        loss_module = MaskedLoss(make_model(device="cpu", checkpointing=checkpointing))
        inputs = make_inputs(step)
        before, ledger.peak, ledger.flops = ledger.bytes, 0, 0
        with autocast(precision):
            total = loss_module(**inputs)["total"]
        activations = ledger.bytes - before
        total.backward()
        del total
        assert ledger.bytes - before == counted.gradients
    rounding = 0.0 if precision == "no" else 0.01  # of what autocast casts back and forth
    assert activations == pytest.approx(counted.activations, rel=rounding)
    assert ledger.peak + counted.optimizer == pytest.approx(counted.peak, rel=rounding)
    with FlopCounterMode(display=False) as flops, autocast(precision):
        loss_module(**inputs)["total"].backward()
    assert counted.flops == ledger.flops == flops.get_total_flops()


def test_activations_are_what_autograd_saves():
    model = make_model(device="cpu")
    loss_module, saved = MaskedLoss(model), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t
    ):
        total = loss_module(**make_inputs(STEP))["total"]
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    size = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights)
    assert total.requires_grad and cost().activations == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(
    ("optimizer", "least", "most"),
    [
        ("adamw", 2, 2),
        ("lion", 1, 1),
        ("muon", 1, 2),
        ("adafactor", 0, 0.1),
        ("8bit_adamw", 0.5, 0.6),
    ],
)
def test_copies_of_the_weights(optimizer, least, most):
    weights = sum(p.nbytes for p in make_model().parameters())
    for use_ema in (False, True):
        counted = cost(Step(**vars(STEP) | {"optimizer": optimizer, "use_ema": use_ema}))
        assert counted.weights == counted.gradients == weights
        assert counted.ema == use_ema * weights
        assert least * weights <= counted.optimizer <= most * weights + 4096  # step numbers
    assert (counted.update_flops > 0) == (optimizer in ("muon", "adafactor"))  # matrix products


def test_eight_bit_states_are_those_of_the_library():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make_model(device="cpu")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    whole = {value.data_ptr(): value.nbytes for value in states if isinstance(value, torch.Tensor)}
    counted = cost(Step(**vars(STEP) | {"optimizer": "8bit_adamw"})).optimizer
    maps = 2 * 256 * 4  # of all parameters together
    assert counted == sum(whole.values()) - maps


EXTRAS = [
    ({"soft_codes": 4}, {}),
    ({"predicts_first": 1.0}, {"self_conditioning": True}),
    ({"judged": 64}, {"critic_head": True}),
    ({"soft_codes": 4, "predicts_first": 1.0, "judged": 64}, None),
]


@pytest.mark.parametrize(("wanted", "fields"), EXTRAS, ids=lambda x: "-".join(x or ()))
def test_what_the_loss_is_given_beside_costs_what_it_costs(wanted, fields):
    """Operations of real passes with soft targets, a prediction before, a critic after."""
    fields = {"self_conditioning": True, "critic_head": True} if fields is None else fields
    step = Step(**vars(STEP) | wanted)
    inputs = make_inputs(step)
    if step.predicts_first:
        inputs["previous"] = inputs["input_ids"]
    model = make_model(device="cpu", **fields)
    with FlopCounterMode(display=False) as flops:
        MaskedLoss(model)(**inputs)["total"].backward()
    assert cost(step, **fields).flops == flops.get_total_flops()


def test_a_prediction_in_some_of_the_steps():
    often, never, some = (
        cost(Step(**vars(STEP) | {"predicts_first": share}), self_conditioning=True)
        for share in (1.0, 0.0, 0.25)
    )
    assert some.flops == pytest.approx(never.flops + (often.flops - never.flops) / 4)
    assert some.peak == often.peak == never.peak


def test_passes_recomputation_and_precision_change_what_they_should():
    plain = cost()
    often = cost(Step(**vars(STEP) | {"passes": 5}))
    assert often.flops == 5 * plain.flops
    assert often.activations == pytest.approx(plain.activations)
    assert often.peak == pytest.approx(plain.peak + plain.gradients, rel=0.02)
    again = cost(checkpointing=True)
    assert plain.flops < again.flops < 4 / 3 * plain.flops
    assert again.activations < plain.activations / 3 and again.peak < plain.peak
    narrow = cost(Step(**vars(STEP) | {"precision": "bf16"}))
    assert narrow.activations < plain.activations and narrow.flops == plain.flops
    more = cost(Step(**vars(STEP) | {"rows": 8, "scored": 300}))
    assert more.activations == pytest.approx(2 * plain.activations, rel=0.02)


def test_a_gpu_keeps_no_attention_weights():
    long = Step(rows=1, length=1024, scored=600)
    on_cpu, on_gpu = (cost(long, device, num_vq_tokens=1024) for device in ("cpu", "cuda"))
    matrices = 3 * 2 * 4 * 1024**2  # layers, heads, float32
    assert on_gpu.activations < on_cpu.activations - 2 * matrices
    assert cost(long, "cuda", num_vq_tokens=1024, checkpointing=True).peak < on_gpu.peak


def kept_on(device, model, step):
    """Bytes that a forward pass leaves, on tensors that say they are on `device`."""
    ledger = Ledger()
    with no_data(), ledger:
        state = {name: torch.empty_like(t, device=device) for name, t in model.state_dict().items()}
        model = copy.deepcopy(model)
        model.load_state_dict(state, assign=True)
        loss_module = MaskedLoss(model)
        loss_module.forward = like_gpu(loss_module.forward)
        inputs = {name: t.to(device) for name, t in make_inputs(step).items()}
        before = ledger.bytes
        torch.set_autocast_enabled(device, step.precision in AUTOCAST)
        torch.set_autocast_dtype(device, AUTOCAST.get(step.precision, torch.float16))
        try:
            total = loss_module(**inputs)["total"]
        finally:
            torch.set_autocast_enabled(device, False)
            torch.clear_autocast_cache()
        return (ledger.bytes - before) * total.requires_grad


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch knows no GPU's rules")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("kind", [MaskGitTransformer, MaskGiTUViT])
def test_the_ways_of_a_gpu(monkeypatch, kind, norm, precision):
    """Against torch's own rules for a GPU: its kernels' and its mixed precision's. Of these, only
    the choice of an attention kernel needs a GPU to be there."""
    blocks = {"block_out_channels": (64,), "block_num_heads": 2, "in_channels": 64}
    fields = SMALL | {"norm_type": norm} | (blocks if kind is MaskGiTUViT else {})
    fields = {name: value for name, value in fields.items() if name in vars(kind.config_class)}
    with torch.device("meta"):
        model = kind(**fields)
    condition = condition_shapes(model)
    step = Step(**vars(STEP) | {"precision": precision, "condition": condition})
    ours = kept_on("cpu", model, step)
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(step_cost, "GPU_WAYS", {attention: step_cost.GPU_WAYS[attention]})
    assert ours == pytest.approx(kept_on("cuda", model, step), rel=0.005)


def test_a_process_forked_afterwards_can_train():
    """Counting leaves no thread of autograd behind, which no fork could bear."""
    code = (
        "import os, torch; from train_stage.training.step_cost import no_data\n"
        "x = torch.ones(2, requires_grad=True)\n"
        "with no_data():\n"
        "    torch.ones(2, requires_grad=True).sum().backward()\n"
        "if os.fork():\n"
        "    raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "x.sum().backward()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


MEASURE = """
import json, sys, torch, torch._dynamo
from train_stage.objective.loss import MaskedLoss
from train_stage.training.optimizer import make_optimizer
from train_stage.training.step_cost import Step, make_inputs
from train_stage.models.transformer import MaskGitTransformer

def memory(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024

fields, step = json.loads(sys.argv[1])
model = MaskGitTransformer(num_hidden_layers=1)  # wakes the libraries
MaskedLoss(model)(**make_inputs(Step(1, 8, 8)))["total"].backward()
del model
before = memory("VmRSS")
loss_module = MaskedLoss(MaskGitTransformer(**fields).train())
optimizer = make_optimizer(loss_module, "adamw", 1e-4, (0.9, 0.999), 0.01, 1e-8)
for _ in range(2):
    loss_module(**make_inputs(Step(**step)))["total"].backward()
    optimizer.step()
    optimizer.zero_grad()
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure")
def test_a_process_takes_what_was_counted():
    """Its peak over two steps, less what it had before; with an allocator that gives memory back
    at once, as the default one keeps up to a third more."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_vq_tokens": 256}
    fields = SMALL | sizes | {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    step = Step(rows=8, length=256, scored=1300)
    counted = cost(step, **fields).peak
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([fields, vars(step)])],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 0.95 * counted < int(done.stdout) < 1.05 * counted + 40e6
