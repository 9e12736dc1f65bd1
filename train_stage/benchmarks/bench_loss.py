"""What the loss costs in training: logits of all codes, of scored ones, and of those in chunks.

    python -m train_stage.bench loss [--batch 8] [--rounds 3] [--dtype bfloat16]

A training step (AdamW) of the published ImageNet configuration, 230 M parameters, and the head of
aMUSEd-256 alone, 8,192 outputs, forward and backward. Random weights, codes and masks; every line
of a table is from a process of its own.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from statistics import median

import torch
from torch import Tensor

from train_stage.models.token_transformer import TokenTransformer
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.objective.chunked_loss import linear_cross_entropy
from train_stage.objective.loss import IGNORE, token_loss
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.objective.masking import draw_mask
from train_stage.training.devices import pick_device

PARTS = ["ImageNet step", "aMUSEd-256 head"]
WAYS = ["all logits", "scored codes", "scored codes in chunks"]
CODES, BATCH = 256, 8


def bench_loss(options: argparse.Namespace) -> None:
    """Prints one table a part."""
    options.batch = options.batch or BATCH
    print(f"{options.batch} images of {CODES} codes, {options.dtype}, torch {torch.__version__}")
    for part in PARTS:
        if options.only and not any(word in part for word in options.only):
            continue
        print(f"\n{part}\n\n| way | ms | peak MiB |\n| --- | --- | --- |")
        for way in WAYS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                found = process.submit(measure, part, way, options).result()
            print("| {} | {:,.0f} | {:,.0f} |".format(way, *found), flush=True)


def measure(part: str, way: str, options: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds a step (median) and the process's most memory, MiB (a GPU's own, on one)."""
    device, dtype = pick_device(options.device), options.torch_dtype
    torch.manual_seed(0)
    model, trunk, codes = make_part(part, options.batch, device)
    draw = draw_mask(options.batch, CODES, get_mask_schedule("cosine"), torch.Generator())
    labels = torch.where(draw.mask.to(device), codes, IGNORE)
    positions = draw.mask.flatten().nonzero().squeeze(-1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    milliseconds = []
    for _ in range(1 + options.rounds):
        synchronize(device)
        began = time.perf_counter()
        with mixed:
            loss = mean_loss(way, model, trunk(), labels, positions)
        loss.backward()
        if part == "ImageNet step":
            optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        milliseconds.append(1e3 * (time.perf_counter() - began))
    if device.type == "cuda":
        return median(milliseconds[1:]), torch.cuda.max_memory_allocated(device) / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return median(milliseconds[1:]), kib / (2**20 if sys.platform == "darwin" else 1024)


def make_part(
    part: str, batch: int, device: torch.device
) -> tuple[TokenTransformer, Callable[[], Tensor], Tensor]:
    """A model, what gives its hidden states (B, N, E), and codes (B, N)."""
    model: TokenTransformer
    if part == "ImageNet step":
        model = MaskGitTransformer(
            vocab_size=2048,
            num_hidden_layers=24,
            num_attention_heads=16,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            num_classes=1000,
        )
        codes = torch.randint(0, 1024, (batch, CODES), device=device)
        model = model.train().to(device)
        return model, lambda: model.hidden_states(codes), codes
    model = MaskGiTUViT(num_hidden_layers=1, num_res_blocks=1).train().to(device)
    codes = torch.randint(0, 8192, (batch, CODES), device=device)
    hidden = torch.randn(batch, CODES, 768, device=device, requires_grad=True)
    return model, lambda: hidden, codes


def mean_loss(
    way: str, model: TokenTransformer, hidden: Tensor, labels: Tensor, positions: Tensor
) -> Tensor:
    """The same number in every way."""
    if way == "all logits":
        return token_loss(model.logits(hidden), labels)
    features = model.head(hidden.flatten(0, 1).index_select(0, positions))
    matrix, bias = model.output_layer()
    targets = labels.flatten().index_select(0, positions)
    chunk = None if way == "scored codes in chunks" else labels.numel()
    return linear_cross_entropy(features, matrix, bias, targets, chunk=chunk).total / len(targets)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
