"""The transformers at full size beside diffusers' aMUSEd: forward, training step, sampling.

    python -m train_stage.bench models [--dtype bfloat16] [--compile]

aMUSEd-256 with random weights, the same on both sides, in one process; and the ImageNet
configuration, which diffusers does not have, beside its plain way (logits of every position). A
training step is forward, loss, backward and AdamW; sampling is 12 steps with guidance, up to codes.
"""

import argparse
import gc
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_stage.benchmarks.timing import Way, count_flops, matmul_tflops, measure, print_table
from train_stage.models.amused import config_to_amused, state_to_amused
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.objective.loss import IGNORE
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.objective.masking import apply_mask, class_tokens, draw_mask, prepend_token
from train_stage.sampling.generation import generate
from train_stage.training.devices import pick_device

IMAGENET = {  # the published class-conditional configuration, 24 layers of width 768
    "vocab_size": 2048,
    "max_position_embeddings": 264,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "layer_norm_eps": 1e-6,
    "num_classes": 1000,
}
STEPS, GUIDANCE, CODES = 12, 10.0, 256
TRAIN_BATCH = 4  # images


def bench_models(options: argparse.Namespace) -> None:
    """Prints one table a part."""
    device, dtype = pick_device(options.device), options.torch_dtype
    speed = matmul_tflops(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.dtype}")
    print(f"a large matrix product reaches {speed:.3g} TFLOP/s")
    for title, part in PARTS.items():
        if options.only and not any(word in title for word in options.only):
            continue
        images, ways = part(device, dtype, options)
        measured = measure(ways, device, options.rounds)
        print_table(title, measured, count_flops(next(iter(ways.values()))), speed, images)
        del ways
        gc.collect()
        torch._dynamo.reset()


def amused_forward(device: torch.device, dtype: torch.dtype, options: Any) -> tuple:
    """Logits of every position, a conditional and an unconditional row for each image."""
    ours, theirs = amused_pair(device, dtype)
    rows = 2 * options.images
    condition, ids = amused_condition(rows, device, dtype), torch.full((rows, CODES), 8255)
    ids, (text, pooled, micro) = ids.to(device), condition.values()

    def call_theirs(model: Any) -> Tensor:
        return model(ids.view(rows, 16, 16), text, pooled, micro).flatten(2).transpose(1, 2)

    with torch.inference_mode():
        wanted = call_theirs(theirs)
        error = (ours(ids, **condition) - wanted).abs().max() / wanted.abs().max()
    print(f"\nlogits differ by {float(error):.1e} of the largest")
    ways: dict[str, Way] = {"diffusers": lambda: call_theirs(theirs)}
    ways["ours"] = lambda: ours(ids, **condition)
    if options.compile:
        fast_theirs, fast_ours = compiled(theirs, device), compiled(ours, device)
        ways["diffusers, compiled"] = lambda: call_theirs(fast_theirs)
        ways["ours, compiled"] = lambda: fast_ours(ids, **condition)
    return options.images, no_grad(ways)


def amused_training(device: torch.device, dtype: torch.dtype, options: Any) -> tuple:
    """A step on masked codes; below float32 by autocast over float32 weights."""
    ours, theirs = amused_pair(device, torch.float32)
    rows = options.batch or TRAIN_BATCH
    condition = amused_condition(rows, device, torch.float32)
    ids, labels = masked_batch(rows, 8255, 8192, device)
    text, pooled, micro = condition.values()

    def loss_of_theirs(model: Any) -> Tensor:
        logits = model(ids.view(rows, 16, 16), text, pooled, micro)  # (B, K, h, w)
        logits = logits.reshape(rows, 8192, -1).permute(0, 2, 1).reshape(-1, 8192)
        return F.cross_entropy(logits, labels.view(-1), ignore_index=IGNORE)

    ways = {
        "diffusers": training_step(theirs, lambda: loss_of_theirs(theirs), device, dtype),
        "ours": training_step(ours, lambda: ours.loss(ids, labels, **condition), device, dtype),
    }
    if options.compile:
        fast = compiled(theirs, device)
        ways["diffusers, compiled"] = training_step(
            theirs, lambda: loss_of_theirs(fast), device, dtype
        )
        blocks = deepcopy(ours)
        for block in blocks.layers():
            block.compile(fullgraph=True, dynamic=False)
        ways["ours, blocks compiled"] = training_step(
            blocks, lambda: blocks.loss(ids, labels, **condition), device, dtype
        )
    return rows, ways


def amused_sampling(device: torch.device, dtype: torch.dtype, options: Any) -> tuple:
    """Codes by AmusedPipeline and by generate, from the same draws, in 12 steps."""
    from diffusers import AmusedPipeline, AmusedScheduler, VQModel

    ours, theirs = amused_pair(device, dtype)
    vq: Any = VQModel(lookup_from_codebook=True)  # a pipeline has one; codes do not need it
    condition = amused_condition(2 * options.images, device, dtype)
    (text, no_text), (pooled, no_pooled), (micro, _) = (x.chunk(2) for x in condition.values())

    def call_theirs(model: nn.Module) -> Tensor:
        pipeline: Any = AmusedPipeline(
            vq.to(device), None, None, model, AmusedScheduler(mask_token_id=8255)
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            prompt_embeds=pooled,
            encoder_hidden_states=text,
            negative_prompt_embeds=no_pooled,
            negative_encoder_hidden_states=no_text,
            height=16 * vq_scale(vq),
            width=16 * vq_scale(vq),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
            micro_conditioning_aesthetic_score=6,
        )[0].flatten(1)

    micro[:, :2] = 16 * vq_scale(vq)

    def call_ours(compiler: Any = None) -> Tensor:
        return generate(
            ours,
            encoder_hidden_states=text,
            cond_embeds=pooled,
            micro_conds=micro,
            negative_embeds=no_text,
            negative_cond_embeds=no_pooled,
            temperature=(2, 0),
            timesteps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
            compiler=compiler,
        )

    same = (call_theirs(theirs) == call_ours()).float().mean()
    print(f"\n{float(same):.1%} of the sampled codes are the same")
    ways: dict[str, Way] = {"AmusedPipeline": lambda: call_theirs(theirs), "ours": call_ours}
    if options.compile:
        trunk, fast = ours.hidden_states, compiled(ours.hidden_states, device)
        fast_theirs = compiled(theirs, device)
        ways["AmusedPipeline, compiled"] = lambda: call_theirs(fast_theirs)
        ways["ours, compiled"] = with_trunk(ours, fast, trunk, lambda: call_ours(torch.compile))
    return options.images, no_grad(ways)


def imagenet_forward(device: torch.device, dtype: torch.dtype, options: Any) -> tuple:
    """Logits of every position."""
    model = MaskGitTransformer(**IMAGENET).to(device, dtype).eval()
    ids = torch.full((2 * options.images, CODES + 1), model.mask_token_id, device=device)
    ways: dict[str, Way] = {"ours": lambda: model(ids)}
    if options.compile:
        fast = compiled(model, device)
        ways["ours, compiled"] = lambda: fast(ids)
    return options.images, no_grad(ways)


def imagenet_training(device: torch.device, dtype: torch.dtype, options: Any) -> tuple:
    """A step with the loss of all logits, and with those of the scored codes only."""
    model = MaskGitTransformer(**IMAGENET).to(device)
    ids, labels = masked_batch((options.batch or TRAIN_BATCH), model.mask_token_id, 1024, device)
    token = class_tokens(labels.new_zeros(len(ids)), labels.new_zeros(len(ids)).bool(), 1024, 2047)
    ids, labels = prepend_token(ids, labels, token)
    step = partial(training_step, model, device=device, dtype=dtype)
    ways = {
        "plain: all logits": step(lambda: model(ids, labels=labels)[1]),
        "ours": step(lambda: model.loss(ids, labels)),
    }
    if options.compile:
        fast = deepcopy(model)
        for layer in fast.layers():
            layer.compile(fullgraph=True, dynamic=False)
        ways["ours, layers compiled"] = training_step(
            fast, lambda: fast.loss(ids, labels), device, dtype
        )
    return (options.batch or TRAIN_BATCH), ways


def imagenet_sampling(device: torch.device, dtype: torch.dtype, options: Any) -> tuple:
    """12 steps, guidance 3; plain: the whole model and all logits at every step."""
    model = MaskGitTransformer(**IMAGENET).to(device, dtype).eval()
    class_ids = torch.arange(options.images, device=device)

    def call(compiler: Any = None, everywhere: bool = False) -> Any:
        return generate(
            model,
            class_ids=class_ids,
            timesteps=STEPS,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            compiler=compiler,
            return_intermediate=everywhere,
        )

    ways: dict[str, Way] = {"logits everywhere": lambda: call(everywhere=True), "ours": call}
    if options.compile:
        trunk, fast = model.hidden_states, compiled(model.hidden_states, device)
        ways["ours, compiled"] = with_trunk(model, fast, trunk, lambda: call(torch.compile))
    return options.images, no_grad(ways)


PARTS: dict[str, Callable[..., tuple]] = {
    "aMUSEd-256 forward": amused_forward,
    "aMUSEd-256 training step": amused_training,
    "aMUSEd-256 sampling": amused_sampling,
    "ImageNet forward": imagenet_forward,
    "ImageNet training step": imagenet_training,
    "ImageNet sampling": imagenet_sampling,
}


def amused_pair(device: torch.device, dtype: torch.dtype) -> tuple[MaskGiTUViT, nn.Module]:
    """Our aMUSEd-256 with random weights, and diffusers' with the same."""
    from diffusers import UVit2DModel

    with torch.device("meta"):
        ours = MaskGiTUViT()
        theirs = UVit2DModel.from_config(config_to_amused(ours.config_dict()))
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.02 * torch.randn(tensor.shape, generator=generator) + float("norm" in name)
        for name, tensor in ours.state_dict().items()
    }
    state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    ours.load_state_dict(state, assign=True)
    theirs.load_state_dict(state_to_amused(state), assign=True)
    return ours.eval(), theirs.eval()


def amused_condition(rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Text states, pooled text and micro-conditions for `rows` rows."""
    generator = torch.Generator().manual_seed(1)
    return {
        "encoder_hidden_states": torch.randn(rows, 77, 768, generator=generator).to(device, dtype),
        "cond_embeds": torch.randn(rows, 768, generator=generator).to(device, dtype),
        "micro_conds": torch.tensor([[256.0, 256, 0, 0, 6]] * rows).to(device, dtype),
    }


def masked_batch(
    rows: int, mask_id: int, codebook_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """input_ids and labels (rows, 256) as training makes them."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, codebook_size, (rows, CODES), generator=generator)
    mask = draw_mask(rows, CODES, get_mask_schedule("cosine"), generator).mask
    ids, labels = apply_mask(codes, mask, mask_id)
    return ids.to(device), labels.to(device)


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], device: torch.device, dtype: torch.dtype
) -> Way:
    """Forward, loss, backward and AdamW; below float32 by autocast over float32 weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        model.train()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compiled(function: Any, device: torch.device) -> Any:
    """By torch.compile; with CUDA graphs on a GPU."""
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(function, fullgraph=True, mode=mode)


def with_trunk(model: Any, fast: Any, trunk: Any, way: Way) -> Way:
    """`way` while the model's trunk is the compiled one."""

    def call() -> Any:
        model.hidden_states = fast
        try:
            return way()
        finally:
            model.hidden_states = trunk

    return call


def no_grad(ways: dict[str, Way]) -> dict[str, Way]:
    return {name: torch.no_grad()(way) for name, way in ways.items()}


def vq_scale(vq: Any) -> int:
    """Pixels along a side of a code."""
    return 2 ** (len(vq.config.block_out_channels) - 1)
