"""Our models and functions against recordings of the reference (tests/parity/*).

Floats within 1e-4 of the largest wanted value, indices equal, 8-bit images within one level,
gradient norms within 1e-3. `python tests/test_parity.py` prints the largest error of every case.
"""

import functools
import json
import math
import random
from pathlib import Path

import numpy as np
import parity_adapter as adapter
import pytest
import torch
from safetensors.torch import load_file

from train_stage.training.optimizer import no_decay

CASES = Path(__file__).parent / "parity"
ALLOWED = {"float": 1e-4, "number": 1e-4, "image": 1 / 255, "exact": 0.0, "plain": 0.0}
ALLOWED_GRADIENT = 1e-3
ON_PURPOSE = {"no_decay_names": "the reference decays norm.norm.weight and its like by omission"}
"""Methods in which we differ, and why."""


def calls():
    for folder in sorted(CASES.iterdir()):
        for call in recorded_calls(folder):
            yield pytest.param(folder, call, id=f"{folder.name}-{call['id']}")


def recorded_calls(folder):
    recorded = json.loads((folder / "case.json").read_text())["calls"]
    return [call for call in recorded if call["method"] not in ON_PURPOSE]


@pytest.mark.parametrize(("folder", "call"), calls())
def test_recorded_call(folder, call):
    errors = run(folder, call)
    wrong = {key: value for key, value in errors.items() if not value[0] <= value[1]}  # NaN, too
    assert errors and not wrong


def test_no_norm_is_decayed_where_the_reference_forgets_some():
    (call,) = (
        call
        for call in json.loads((CASES / "data" / "case.json").read_text())["calls"]
        if call["method"] in ON_PURPOSE
    )
    (names,) = call["args"]
    reference = {item["value"] for item in call["returns"]["items"]}
    forgotten = {"r.norm.norm.weight", "project_to_hidden_norm.weight"}
    forgotten |= {"mlm_layer.layer_norm.norm.weight", "channelwise.2.gamma"}
    assert {name for name in names if no_decay(name)} == reference | forgotten


def run(folder, call):
    """Repeats a recorded call; {value: (largest relative error, what is allowed)}."""
    subject, tensors = load(folder)
    args = [decode(value, tensors) for value in call.get("args", [])]
    kwargs = {key: decode(value, tensors) for key, value in call.get("kwargs", {}).items()}
    if isinstance(subject, torch.nn.Module):
        subject.train(call.get("mode") == "train").zero_grad()
    if call.get("seed") is not None:
        random.seed(call["seed"])
        torch.manual_seed(call["seed"])
    with torch.set_grad_enabled(bool(call.get("grads"))):
        if subject is None:
            got = adapter.functions()[call["method"]](*args, **kwargs)
        else:
            got = adapter.call(subject, call["method"], args, kwargs)
    errors = dict(compare(call["returns"], got, tensors, "returns"))
    return errors | (gradient_errors(subject, call, got) if call.get("grads") else {})


@functools.lru_cache(maxsize=1)
def load(folder):
    """What a case calls (a model, a pipeline, None for plain functions) and its tensors."""
    info = json.loads((folder / "case.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    if info["model"] == "functions":
        return None, tensors
    if info["model"] != "pipeline":
        return build(info["model"], info["kwargs"], folder / "weights.safetensors"), tensors
    parts = dict(info.get("extra", {}))
    for part, (name, config) in info["parts"].items():
        elsewhere = info.get("weights_from", {}).get(part)
        path = CASES / elsewhere if elsewhere else folder / f"weights_{part}.safetensors"
        parts[part] = build(name, config, path)
    return adapter.pipeline(info["pipeline"], parts), tensors


def build(name, config, weights):
    model = adapter.build(name, config)
    state = load_file(weights).items()
    halves = (torch.float16,)  # how float32 weights are stored; counters stay integers
    model.load_state_dict({k: v.float() if v.dtype in halves else v for k, v in state})
    return model.eval()


def decode(value, tensors):
    """A recorded argument as a value."""
    kind, inner = next(iter(value.items())) if isinstance(value, dict) and value else ("", None)
    if kind == "tensor":
        return tensors[inner].clone()
    if kind == "generator":
        return torch.Generator().manual_seed(inner)
    if kind == "schedule":
        return adapter.get_mask_schedule(inner[0], **inner[1])
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in inner.items()}
    if kind in ("tuple", "list_of"):
        items = [decode(item, tensors) for item in inner]
        return tuple(items) if kind == "tuple" else items
    return value


def compare(want, got, tensors, path):
    """Yields (path, (relative error, what is allowed)) of every recorded value."""
    kind = want["kind"]
    if kind in ("list", "dict"):
        items = list(want["items"].items() if kind == "dict" else enumerate(want["items"]))
        assert len(got) == len(items), f"{path}: {len(got)} values, not {len(items)}"
        for key, inner in items:
            yield from compare(inner, got[key], tensors, f"{path}[{key}]")
        return
    if kind == "plain":
        error = 0.0 if got == want["value"] else math.inf
    elif kind == "number":
        difference = abs(float(got) - want["value"])
        error = 0.0 if difference <= 1e-9 else difference / abs(want["value"] or 1e-12)
    else:
        got = got.detach() if isinstance(got, torch.Tensor) else torch.as_tensor(np.array(got))
        wanted = tensors[want["key"]]
        error = tensor_error(kind, wanted, got) if got.shape == wanted.shape else math.inf
    yield path, (error, ALLOWED[kind])


def tensor_error(kind, wanted, got):
    wanted, got = wanted.double(), got.double()
    difference = torch.where(wanted == got, 0.0, (got - wanted).abs())  # equal infinities: 0
    largest = difference.max().item() if wanted.numel() else 0.0
    if kind == "exact":
        return math.inf if largest else 0.0
    if kind == "image":
        return largest / 255
    finite = wanted[wanted.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 1.0
    return 0.0 if largest <= 1e-9 else largest / (scale + 1e-12)


def gradient_errors(model, call, got):
    grads, loss = call["grads"], torch.zeros(())
    if grads.get("loss_at") is not None:
        loss = loss + got[grads["loss_at"]]
    if grads.get("plus_mean_square_of") is not None:
        loss = loss + got[grads["plus_mean_square_of"]].square().mean()
    loss.backward()
    norms = {
        n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in model.named_parameters()
    }
    wanted = {name: norm or 0.0 for name, norm in call["grad_norms"].items()}
    largest = max(wanted.values())
    return {
        f"gradient of {name}": (abs(norms[name] - norm) / largest, ALLOWED_GRADIENT)
        for name, norm in wanted.items()
    }


def main():
    print(f"{'case':28} calls  largest error  of gradient norms")
    for folder in sorted(CASES.iterdir()):
        recorded = recorded_calls(folder)
        errors = {}
        for call in recorded:
            errors |= {f"{call['id']} {key}": value for key, value in run(folder, call).items()}
        values = [error for error, allowed in errors.values() if allowed != ALLOWED_GRADIENT]
        gradients = [error for error, allowed in errors.values() if allowed == ALLOWED_GRADIENT]
        shown = f"{max(gradients):.1e}" if gradients else "-"
        print(f"{folder.name:28} {len(recorded):5}  {max(values):13.1e}  {shown:>17}")


if __name__ == "__main__":
    main()
