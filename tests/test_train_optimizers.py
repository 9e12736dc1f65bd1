"""Optimizers beside their equations, which weights are decayed, and the stable schedule."""

import copy
import math
from typing import get_args

import pytest
import torch
from torch import nn

from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.training.ema import EMA
from train_stage.training.lion import Lion
from train_stage.training.lr_schedule import SchedulerName, lr_factor
from train_stage.training.optimizer import OptimizerName, make_optimizer, no_decay

NAMES = [name for name in get_args(OptimizerName) if name != "8bit_adamw"]


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 16))


def train(net, optimizer, steps, seed=1):
    """Losses of learning the identity."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 16, generator=generator)
        loss = (net(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def made(net, name, rate=1e-2):
    return make_optimizer(net, name, rate, (0.9, 0.99), 0.01, 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_and_goes_on_from_its_state(name):
    net = small_net()
    optimizer = made(net, name)
    losses = train(net, optimizer, 60)
    assert losses[-1] < 0.6 * losses[0]
    again = copy.deepcopy(net)
    resumed = made(again, name)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(again, resumed, 3, seed=2) == train(net, optimizer, 3, seed=2)


def test_8_bit_adamw_follows_adamw():
    pytest.importorskip("bitsandbytes")
    nets = [nn.Sequential(nn.Linear(16, 512), nn.GELU(), nn.Linear(512, 16)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    full, small = made(nets[0], "adamw", 1e-3), made(nets[1], "8bit_adamw", 1e-3)
    ours, theirs = train(nets[0], full, 40), train(nets[1], small, 40)
    assert theirs == pytest.approx(ours, rel=0.05) and ours[-1] < 0.5 * ours[0]
    kinds = {t.dtype for t in small.state[nets[1][0].weight].values() if torch.is_tensor(t)}
    assert torch.uint8 in kinds  # the state of a large matrix is small


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"pip install 'open-muse\[8bit\]'"):
        made(small_net(), "8bit_adamw")


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="optimizer.name=sgd: legal are adamw, fused_adamw"):
        made(small_net(), "sgd")


def test_lion_is_its_equation():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, 3))
    unused = nn.Parameter(torch.ones(2))
    optimizer = Lion([p, unused], lr=0.1, betas=(0.9, 0.8), weight_decay=0.5)
    expected, momentum = p.detach().clone(), torch.zeros(5, 3)
    for _ in range(4):
        gradient = torch.randn(5, 3)
        p.grad = gradient
        optimizer.step()
        expected *= 1 - 0.1 * 0.5
        expected -= 0.1 * torch.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.8 * momentum + 0.2 * gradient
        torch.testing.assert_close(p.detach(), expected)
    assert torch.equal(unused, torch.ones(2))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (MaskGiTUViT, {"use_bias": True, "num_hidden_layers": 1}),
        (MaskGitTransformer, {"use_bias": True, "num_hidden_layers": 1, "num_classes": 10}),
        (MaskGitTransformer, {"num_hidden_layers": 1, "use_conv_in_out": True}),
    ],
)
def test_norms_biases_and_embeddings_are_not_decayed_and_all_else_is(kind, fields):
    with torch.device("meta"):
        model = kind(**fields)
    spared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        is_vector = sum(side > 1 for side in parameter.shape) <= 1
        assert no_decay(name) == (is_vector or id(parameter) in spared), name


def test_frozen_weights_are_copied_into_the_average_exactly():
    net = small_net()
    net[0].weight.requires_grad_(False)
    ema = EMA(net, decay=0.5, use_ema_warmup=False)
    ema.optimization_step = 100  # past the warm-up
    before = {name: shadow.clone() for name, shadow in ema.shadow.items()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.123)
    ema.update(net)
    assert torch.equal(ema.shadow["0.weight"], net[0].weight)
    halfway = (before["3.weight"] + net[3].weight.detach()) / 2
    torch.testing.assert_close(ema.shadow["3.weight"], halfway)


def test_warmup_stable_decay_rises_stays_and_falls_to_nothing():
    curve = [lr_factor("warmup_stable_decay", s, 10, 100, decay_steps=20) for s in range(101)]
    assert curve[:11] == [s / 10 for s in range(11)] and set(curve[10:81]) == {1.0}
    assert curve[90] == pytest.approx(1 - math.sqrt(0.5)) and curve[100] == 0
    assert curve[80:] == sorted(curve[80:], reverse=True)
    by_default = [lr_factor("warmup_stable_decay", s, 10, 100) for s in range(101)]
    assert by_default == curve


@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_every_schedule_is_defined_before_within_and_after(name):
    for step in (0, 1, 5, 50, 99, 100, 101):
        assert 0 <= lr_factor(name, step, 5, 100, learning_rate=1e-4) <= 1.01
