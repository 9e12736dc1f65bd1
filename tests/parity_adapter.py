"""The adapter between this project and the recorded behaviour of the reference models.

Says, for every model and function of the recordings, which of ours answers. Used by
tests/test_parity.py, and by any checker that speaks the same protocol (build, call, functions).
"""

import functools
import itertools
import math
import random

import torch

from tokenize_stage.selection import metadata
from tokenize_stage.selection.captions import merge_person_tokens
from tokenize_stage.selection.config import FiltersConfig
from tokenize_stage.selection.filters import Selection
from tokenize_stage.sources.config import DatasetConfig
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.sources.sample import Sample
from tokenize_stage.vq.amused_vq import config_from_amused, state_from_amused
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.model import VQModel
from tokenize_stage.vq.movq import MOVQ
from tokenize_stage.vq.paella_vq import PaellaVQModel
from tokenize_stage.vq.vqgan import VQGANModel
from tokenize_stage.work.work_split import share_of
from train_stage.models import amused
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT, sinusoidal_encode
from train_stage.objective import masking
from train_stage.objective.buckets import BUCKETS, bucket_of
from train_stage.objective.chunked_loss import linear_cross_entropy
from train_stage.objective.loss import IGNORE
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.objective.predictions import entropies
from train_stage.pipeline.muse_pipeline import MusePipeline
from train_stage.sampling import generation as sampling
from train_stage.sampling import parallel_decoding
from train_stage.sampling.parallel_decoding import hidden_counts, step_temperatures, uniform_noise
from train_stage.training.ema import EMA
from train_stage.training.lion import Lion
from train_stage.training.lr_schedule import lr_factor

VQ_METHODS = {"encode": "encode_latents", "decode": "decode_latents"}


def build(name, config):
    if name not in MODELS:
        raise NotImplementedError(name)
    return MODELS[name](config)


def call(obj, method, args, kwargs):
    if isinstance(obj, VQModel):
        return call_vq(obj, VQ_METHODS.get(method, method), args, kwargs)
    if method == "generate":
        kwargs = {k: v for k, v in kwargs.items() if k not in ("input_ids", "use_tqdm")}
        return sampling.generate_by_score(obj, *args, **kwargs)
    if method == "generate2":
        return generate2(obj, *args, **kwargs)
    return obj(*args, **kwargs) if method == "__call__" else getattr(obj, method)(*args, **kwargs)


def call_vq(vq, method, args, kwargs):
    got = vq(*args, **kwargs) if method == "__call__" else getattr(vq, method)(*args, **kwargs)
    is_short = isinstance(vq, PaellaVQModel) and method == "encode_latents"
    return (*got, None) if is_short else got  # the reference has a place for a loss there


class DiffusersVQ(torch.nn.Module):
    """A VQGANModel, `vq`, that answers as diffusers' VQModel does."""

    def __init__(self, config):
        super().__init__()
        self.vq = VQGANModel.from_config(config_from_amused(config))

    def load_state_dict(self, state):
        self.vq.load_state_dict(state_from_amused(state))

    def encoder(self, pixels):
        return self.vq.encoder(pixels)

    def encode(self, pixels, return_dict):
        return [self.vq.latents(pixels)]

    def decode(self, latents, force_not_quantize=False, shape=None, return_dict=False):
        if force_not_quantize:  # these are codes
            return [self.vq.decode(latents.view(shape[:-1])), torch.zeros(len(latents))]
        quantized, _, loss = self.vq.quantize(latents, return_loss=True)
        return [self.vq.decode_latents(quantized), loss]

    def forward(self, pixels, return_dict):
        return self.decode(*self.encode(pixels, return_dict))


class DiffusersUVit(torch.nn.Module):
    """A MaskGiTUViT, `uvit`, that answers as diffusers' UVit2DModel does."""

    def __init__(self, config):
        super().__init__()
        self.uvit = MaskGiTUViT.from_config(amused.config_from_amused(config))

    def load_state_dict(self, state):
        self.uvit.load_state_dict(amused.state_from_amused(state))

    def forward(self, input_ids, text, pooled, micro_conds):
        grid = tuple(input_ids.shape[1:])
        logits = self.uvit(input_ids.flatten(1), text, pooled, micro_conds, grid=grid)
        return logits.unflatten(1, grid).permute(0, 3, 1, 2)


MODELS = {
    "MaskGitVQGAN": MaskGitVQGAN.from_config,
    "VQGANModel": VQGANModel.from_config,
    "MOVQ": MOVQ.from_config,
    "PaellaVQModel": PaellaVQModel.from_config,
    "diffusers.VQModel": DiffusersVQ,
    "MaskGitTransformer": MaskGitTransformer.from_config,
    "MaskGiTUViT": MaskGiTUViT.from_config,
    "diffusers.UVit2DModel": DiffusersUVit,
}


def pipeline(name, parts):
    if name == "PipelineMuse":
        return functools.partial(call_muse, MusePipeline(parts["vae"], parts["transformer"]))
    ours = MusePipeline(parts["vqvae"].vq, parts["transformer"].uvit)
    return functools.partial(call_amused, ours)


def call_muse(pipe, timesteps=16, transformer_seq_len=None, orig_size=(512, 512), **given):
    """openMUSE's PipelineMuse, whose `text` only counts the prompts when embeddings are given."""
    for name in ("text", "negative_text", "use_tqdm"):
        given.pop(name, None)
    names = ("prompt_embeds", "pooled_embeds")
    condition, negative = (
        tuple(given.pop(f"{half}{name}") for name in names) for half in ("", "negative_")
    )
    side = math.isqrt(transformer_seq_len or 256) * pipe.vae.reduction
    if given.get("guidance_schedule") == "cosine":
        given["guidance_schedule"] = "cosine_floor"
    size = {"height": side, "width": side, "orig_size": orig_size}
    texts = {"prompt_embeds": condition, "negative_embeds": negative}
    return pipe(**texts, **size, num_inference_steps=timesteps, **given)


def call_amused(pipe, output_type, num_images_per_prompt=1, return_dict=False, **given):
    """diffusers' AmusedPipeline, which repeats the prompts as a whole, not each of them."""
    names = ("encoder_hidden_states", "prompt_embeds")
    texts = {}
    for half, ours in (("", "prompt_embeds"), ("negative_", "negative_embeds")):
        found = [given.pop(f"{half}{name}", None) for name in names]
        if found[0] is not None:
            texts[ours] = tuple(torch.cat([x] * num_images_per_prompt) for x in found)
    for ours in ("crop_coords", "aesthetic_score"):
        theirs = f"micro_conditioning_{ours.removesuffix('s')}"
        if theirs in given:
            given[ours] = given.pop(theirs)
    kind = "codes" if output_type == "latent" else output_type
    return [pipe(**texts, output_type=kind, **given)]


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


def soft_target_cross_entropy(logits, labels, soft_targets):
    """Of the K codes only, without position 0, which is the class token's."""
    size = soft_targets.shape[-1]
    labels = labels[:, 1:]
    scored = labels != IGNORE
    ids = torch.arange(size).expand(int(scored.sum()), size)
    scores = linear_cross_entropy(
        logits[:, 1:, :size][scored],
        torch.eye(size),
        None,
        labels[scored],
        soft=(ids, soft_targets[scored]),
    )
    return scores.total / len(ids)


def masked_buckets(input_ids, mask_id):
    return bucket_of((input_ids == mask_id).float().mean(-1))


def entropy_by_bucket(logits, input_ids, mask_id):
    """Means over the images of each bucket, 0 where there are none."""
    masked = input_ids == mask_id
    image = masked.nonzero()[:, 0]
    found = entropies(logits[masked], torch.eye(logits.shape[-1]), None, image, len(masked))
    bucket = masked_buckets(input_ids, mask_id)
    count = torch.bincount(bucket, minlength=BUCKETS).clamp(min=1)
    return [torch.zeros(BUCKETS).index_add(0, bucket, values) / count for values in found]


# sampling: what the reference and diffusers call the parts of parallel_decoding.py


def generate2(model, empty_embeds=None, empty_cond_embeds=None, guidance_schedule=None, **given):
    if isinstance(model, MaskGitTransformer):
        given |= {"temperature_decay": "cumulative"}
    else:  # the older names of the same thing
        if given.get("negative_embeds") is None:
            given["negative_embeds"] = empty_embeds
        if given.get("negative_cond_embeds") is None:
            given["negative_cond_embeds"] = empty_cond_embeds
    if guidance_schedule == "cosine":
        guidance_schedule = "cosine_floor"
    return sampling.generate(model, guidance_schedule=guidance_schedule, **given)


def gumbel_noise(t, generator=None):
    return parallel_decoding.gumbel(uniform_noise(t.shape, t.device, generator))


def mask_by_random_topk(mask_len, probs, temperature=1.0, generator=None):
    noise = temperature * gumbel_noise(probs, generator)
    return parallel_decoding.least_confident(mask_len.long(), probs, noise)


def amused_schedule(config):
    return get_mask_schedule(config.get("masking_schedule", "cosine"))


def amused_step(
    config, steps, temperature, timestep, output, sample, generator, starting_mask_ratio=1.0
):
    logits, ids = output.flatten(2).transpose(1, 2), sample.flatten(1)
    counts = hidden_counts(amused_schedule(config), steps, ids.shape[1], starting_mask_ratio)
    temperatures = step_temperatures(temperature, steps, "linspace")
    step, mask_id = steps - 1 - timestep, config["mask_token_id"]
    left, draws = [], []
    parallel_decoding.decode(
        lambda input_ids, positions, step: parallel_decoding.take(logits, positions),
        ids,
        mask_id,
        counts[: step + 2],  # the step itself and, unless it is the last, one more
        temperatures,
        step,
        generator,
        callback=lambda step, input_ids: left.append(input_ids),
        draws=draws,
    )
    drawn = torch.where(ids == mask_id, draws[0], ids)
    timesteps = torch.arange(steps - 1, -1, -1)
    return [timesteps, torch.tensor(temperatures), *(x.view_as(sample) for x in (left[0], drawn))]


def amused_add_noise(config, steps, timestep, sample, generator):
    ratio = amused_schedule(config)(torch.tensor((steps - timestep) / steps))
    return sampling.add_mask_noise(sample, float(ratio), config["mask_token_id"], generator)


# data: filters, metadata and names of the reference's training/data.py and scripts/pre_encode.py


def select_sample(
    meta,
    min_size=256,
    max_pwatermark=0.5,
    min_aesthetic_score=4.9,
    max_pnsfw=None,
    require_marked_as_not_getty=False,
    require_marked_as_ok_by_spawning=False,
):
    marks = {
        "nsfw": max_pnsfw is not None,
        "getty": require_marked_as_not_getty,
        "spawning": require_marked_as_ok_by_spawning,
    }
    filters = FiltersConfig(
        min_size=min_size,
        max_watermark=max_pwatermark,
        min_aesthetic_score=min_aesthetic_score,
        max_nsfw=max_pnsfw,
        drop_getty=require_marked_as_not_getty,
        drop_spawning=require_marked_as_ok_by_spawning,
        require_metadata=["size", "aesthetic", "watermark", *(k for k, v in marks.items() if v)],
    )
    sample = Sample("key", b"", None, None, "source", meta)
    return Selection(filters).for_shard("shard").check(sample, "0" * 64) is None


def orig_size(meta):
    return [side or 0 for side in metadata.original_size(meta)]


def aesthetic_score(meta):
    return next(iter(metadata.aesthetic_scores(meta)), 0)


def best_of_synthetic(scores, numbers):
    """Of a sample with several images; of ours each image is a sample of its own."""
    values = [float(score) for score in scores.split(",")]
    best = numbers[values.index(max(values))]
    return [f"image {best}", {"aesthetic": 5, "original_width": 1024, "original_height": 1024}]


def distribute_shards(first, last, tasks):
    """Consecutive shards for each task; ours take every tasks-th (work_split.share_of)."""
    bounds = [first]
    for task in range(tasks):
        bounds.append(bounds[-1] + len(share_of(range(first, last + 1), task, tasks)))
    return [[start, end - 1] for start, end in itertools.pairwise(bounds)]


def tar_file_name(url):
    (shard,) = list_input_shards(DatasetConfig(shards_path_or_url=url))
    return f"{shard.name}.tar"


def functions():
    return {
        "select_sample": select_sample,
        "orig_size": orig_size,
        "aesthetic_score": aesthetic_score,
        "merge_person_tokens": merge_person_tokens,
        "best_of_synthetic": best_of_synthetic,
        "distribute_shards": distribute_shards,
        "format_shard_number": "{:05}".format,
        "tar_file_name": tar_file_name,
        "get_mask_schedule": get_mask_schedule,
        "mask_schedule": mask_schedule,
        "gumbel_noise": gumbel_noise,
        "gumbel_sample": sampling.gumbel_sample,
        "top_k": sampling.top_k,
        "mask_by_random_topk": mask_by_random_topk,
        "amused_step": amused_step,
        "amused_add_noise": amused_add_noise,
        "sinusoidal_encode": sinusoidal_encode,
        "lr_curve": lr_curve,
        "ema_run": ema_run,
        "lion_run": lion_run,
        "mask_tokens": mask_tokens,
        "loss_weight": loss_weight,
        "soft_target_cross_entropy": soft_target_cross_entropy,
        "masked_buckets": masked_buckets,
        "pixel_entropy_by_bucket": lambda *args: entropy_by_bucket(*args)[0],
        "image_entropy_by_bucket": lambda *args: entropy_by_bucket(*args)[1],
    }
