"""The loss module of a run, with what training.* wants beside the model (step 7)."""

import torch

from configs.load import ConfigError
from storage.schema import Tokenizer
from train_stage import pictures
from train_stage.config import TrainConfig
from train_stage.models.load_transformer import Transformer, load_transformer
from train_stage.models.token_transformer import TokenTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.objective.chunked_loss import SoftTargets
from train_stage.objective.loss import MaskedLoss
from train_stage.objective.soft_targets import codebook_targets

# fields of a token-critic and its generator, which are given the same codes and condition
SAME_IN_BOTH = (
    "codebook_size",
    "vocab_size",
    "num_classes",
    "add_cross_attention",
    "encoder_hidden_size",
    "cond_embed_dim",
    "null_text_length",
)


def make_loss(
    config: TrainConfig, model: TokenTransformer, tokenizer: Tokenizer, device: torch.device
) -> MaskedLoss:
    """MaskedLoss over the model, compiled if wanted.

    Raises ConfigError for options that the model, the generator or the codebook do not fit.
    """
    training = config.training
    if bool(training.critic) != model.config.critic_head:
        raise ConfigError(
            f"training.critic={training.critic or 'null'}, but model.transformer.critic_head="
            f"{str(model.config.critic_head).lower()}: a critic needs its head, and a head training"
        )
    if model.config.self_conditioning and training.noise_type == "random_replace":
        raise ConfigError(
            "training.noise_type=random_replace, but model.transformer.self_conditioning=true: "
            "predictions of hidden codes are given, and would tell which those are; take mask"
        )
    table = generator = None
    if training.soft_targets == "recomputed":
        table = nearest_codes(config, tokenizer, device)
    if training.critic_generator is not None:
        generator = load_generator(training.critic_generator, model, device)
    height, width = tokenizer.grid
    grid = (height, width) if height != width and isinstance(model, MaskGiTUViT) else None
    loss_module = MaskedLoss(model, training.label_smoothing, table, generator, grid)
    if training.compile:
        loss_module.compile_parts()
    return loss_module


def nearest_codes(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> SoftTargets:
    """Soft targets of every code, from the codebook of the VQ model that made the store."""
    vq = pictures.load_vq(config.model.vq_model.pretrained or tokenizer.name, device)
    pictures.check_tokenizer(vq, tokenizer)
    training = config.training
    return codebook_targets(
        vq.quantizer.vectors, training.soft_code_temp, training.soft_target_codes
    )


def load_generator(path: str, model: TokenTransformer, device: torch.device) -> Transformer:
    """The frozen model whose codes a token-critic judges; it reads the same condition."""
    generator = load_transformer(path).to(device).requires_grad_(False)
    if not isinstance(generator, type(model)):
        kinds = type(generator).__name__, type(model).__name__
        raise ConfigError(
            f"training.critic_generator={path} is a {kinds[0]}, the critic a {kinds[1]}: they must "
            "be of one model.architecture"
        )
    for name in SAME_IN_BOTH:
        found, wanted = (getattr(m.config, name, None) for m in (generator, model))
        if found != wanted:
            raise ConfigError(
                f"training.critic_generator={path}: its {name} is {found}, the critic's {wanted}"
            )
    return generator
