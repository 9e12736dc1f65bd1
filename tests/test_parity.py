"""Our models and functions against recordings of the reference (tests/parity/*).

Floats within 1e-4 of the largest wanted value, indices equal, gradient norms within 1e-3.
"""

import json
import random
from pathlib import Path

import parity_adapter as adapter
import pytest
import torch
from safetensors.torch import load_file

NOT_YET = {"sinusoidal_encode"}  # of the U-ViT
CASES = Path(__file__).parent / "parity"


def calls():
    for folder in sorted(CASES.iterdir()):
        for call in json.loads((folder / "case.json").read_text())["calls"]:
            if call["method"] not in NOT_YET:
                yield pytest.param(folder, call, id=f"{folder.name}-{call['id']}")


def decode(value, tensors):
    """A recorded argument as a value."""
    kind, inner = next(iter(value.items())) if isinstance(value, dict) else ("", None)
    if kind == "tensor":
        return tensors[inner].clone()
    if kind == "generator":
        return torch.Generator().manual_seed(inner)
    if kind == "schedule":
        return adapter.get_mask_schedule(inner[0], **inner[1])
    if kind in ("tuple", "list_of"):
        items = [decode(item, tensors) for item in inner]
        return tuple(items) if kind == "tuple" else items
    return value


def check(want, got, tensors):
    if want["kind"] == "list":
        assert len(got) == len(want["items"])
        for inner, value in zip(want["items"], got, strict=True):
            check(inner, value, tensors)
    elif want["kind"] == "dict":
        for key, inner in want["items"].items():
            check(inner, got[key], tensors)
    elif want["kind"] == "number":
        assert float(got) == pytest.approx(want["value"], rel=1e-4, abs=1e-9)
    elif want["kind"] == "plain":
        assert got == want["value"]
    elif want["kind"] == "exact":
        assert torch.equal(got.long(), tensors[want["key"]].long())  # shapes too
    else:
        wanted = tensors[want["key"]].double()
        assert got.shape == wanted.shape
        finite = wanted[wanted.isfinite()]
        scale = finite.abs().max() if finite.numel() else 1.0
        same = wanted == got
        assert torch.where(same, 0.0, (got.double() - wanted).abs()).max() <= 1e-4 * scale + 1e-9


def load(folder):
    info = json.loads((folder / "case.json").read_text())
    if info["model"] == "functions":
        return None
    model = adapter.build(info["model"], info["kwargs"])
    weights = load_file(folder / "weights.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


@pytest.mark.parametrize(("folder", "call"), calls())
def test_recorded_call(folder, call):
    tensors = load_file(folder / "tensors.safetensors")
    model, functions = load(folder), adapter.functions()
    args = [decode(value, tensors) for value in call.get("args", [])]
    kwargs = {key: decode(value, tensors) for key, value in call.get("kwargs", {}).items()}
    if model is not None:
        model.train(call.get("mode") == "train")
    if call.get("seed") is not None:
        random.seed(call["seed"])
        torch.manual_seed(call["seed"])
    with torch.set_grad_enabled(bool(call.get("grads"))):
        if model is None:
            got = functions[call["method"]](*args, **kwargs)
        else:
            got = adapter.call(model, call["method"], args, kwargs)
    check(call["returns"], got, tensors)
    if call.get("grads"):
        check_gradients(model, call, got)


def check_gradients(model, call, got):
    grads, loss = call["grads"], torch.zeros(())
    if grads.get("loss_at") is not None:
        loss = loss + got[grads["loss_at"]]
    if grads.get("plus_mean_square_of") is not None:
        loss = loss + got[grads["plus_mean_square_of"]].square().mean()
    loss.backward()
    norms = {
        n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in model.named_parameters()
    }
    largest = max(value or 0.0 for value in call["grad_norms"].values())
    for name, wanted in call["grad_norms"].items():
        assert norms[name] == pytest.approx(wanted or 0.0, abs=1e-3 * largest), name
