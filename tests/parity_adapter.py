"""The adapter between this project and the recorded behaviour of the reference models.

Says, for every model and function of the recordings, which of ours answers. Used by
tests/test_parity.py, and by any checker that speaks the same protocol (build, call, functions).
"""

import random

import torch

from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from train_stage import loss, masking, sampling
from train_stage.ema import EMA
from train_stage.mask_schedule import get_mask_schedule
from train_stage.optimizer import Lion, lr_factor
from train_stage.transformer import MaskGitTransformer

MODELS = {"MaskGitVQGAN": MaskGitVQGAN, "MaskGitTransformer": MaskGitTransformer}
VQ_METHODS = {"encode": "encode_latents", "decode": "decode_latents"}


def build(name, config):
    if name not in MODELS:
        raise NotImplementedError(name)
    return MODELS[name].from_config(config)


def call(obj, method, args, kwargs):
    if isinstance(obj, MaskGitVQGAN):
        method = VQ_METHODS.get(method, method)
    if method == "generate":
        kwargs = {k: v for k, v in kwargs.items() if k not in ("input_ids", "use_tqdm")}
        return sampling.generate_by_score(obj, *args, **kwargs)
    if method == "generate2":
        return sampling.generate(obj, *args, temperature_decay="cumulative", **kwargs)
    return obj(*args, **kwargs) if method == "__call__" else getattr(obj, method)(*args, **kwargs)


def pipeline(name, parts):
    raise NotImplementedError(name)


def mask_schedule(name, t, **params):
    return get_mask_schedule(name, **params)(t)


def lr_curve(name, lr, steps, num_warmup_steps=0, num_training_steps=None, num_cycles=1, power=1.0):
    return [
        lr * lr_factor(name, step, num_warmup_steps, num_training_steps or 0, num_cycles, power, lr)
        for step in range(steps)
    ]


def ema_run(start, updates, **options):
    parameter = torch.nn.Parameter(start.clone())
    model = torch.nn.Module()
    model.weight = parameter
    ema = EMA(model, **options)
    used, shadow = [], []
    for update in updates:
        parameter.data = update.clone()
        ema.update(model)
        used.append(ema.last_decay)
        shadow.append(ema.shadow["weight"].clone())
    return {"decay_used": used, "shadow": torch.stack(shadow)}


def lion_run(start, grads, lr, betas, weight_decay):
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Lion([parameter], lr=lr, betas=tuple(betas), weight_decay=weight_decay)
    path = []
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        path.append(parameter.detach().clone())
    return torch.stack(path)


def mask_tokens(image_tokens, mask_id, training, schedule, is_train):
    draw = masking.draw_mask(
        *image_tokens.shape,
        get_mask_schedule(schedule),
        min_masking_rate=training["min_masking_rate"],
        contiguous_region_prob=training.get("mask_contiguous_region_prob"),
        fixed_ratios=None if is_train else training.get("eval_mask_ratios"),
        rng=random,
    )
    input_ids, labels = masking.apply_mask(image_tokens, draw.mask, mask_id)
    if training.get("predict_all_tokens"):
        return input_ids, image_tokens, masking.predict_all_weights(draw), draw.ratio
    return input_ids, labels, None, draw.ratio


def loss_weight(ratio, mask, min_val=0.3):
    return masking.predict_all_weights(masking.MaskDraw(mask.bool(), ratio), min_val)


def functions():
    return {
        "get_mask_schedule": get_mask_schedule,
        "mask_schedule": mask_schedule,
        "gumbel_noise": sampling.gumbel_noise,
        "gumbel_sample": sampling.gumbel_sample,
        "top_k": sampling.top_k,
        "mask_by_random_topk": sampling.mask_by_random_topk,
        "lr_curve": lr_curve,
        "ema_run": ema_run,
        "lion_run": lion_run,
        "mask_tokens": mask_tokens,
        "loss_weight": loss_weight,
        "soft_target_cross_entropy": loss.soft_target_cross_entropy,
        "masked_buckets": loss.masked_buckets,
        "pixel_entropy_by_bucket": lambda *args: loss.entropy_by_bucket(*args)[0],
        "image_entropy_by_bucket": lambda *args: loss.entropy_by_bucket(*args)[1],
    }
