"""A text and a class pipeline so small that they draw in milliseconds, and what goes into them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tokenize_stage.text.text_encoder import TextEncoder
from tokenize_stage.vq.vqgan import VQGANModel
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.pipeline.muse_pipeline import MusePipeline
from train_stage.pipeline.pipeline_folder import PipelineSettings

transformers = pytest.importorskip("transformers")  # skips the tests that import this

GRID, SIZE, CODES = (8, 8), 16, 32
LETTERS = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
SMALL_VQ = {
    "hidden_channels": 32,
    "channel_mult": (1, 1),
    "num_res_blocks": 1,
    "attn_resolutions": (),
    "no_attn_mid_block": True,
    "z_channels": 4,
    "quantized_embed_dim": 4,
    "num_embeddings": CODES,
}
SMALL_UVIT = {
    "hidden_size": 16,
    "cond_embed_dim": 12,
    "micro_cond_encode_dim": 4,
    "micro_cond_embed_dim": 20,
    "encoder_hidden_size": 16,
    "vocab_size": CODES + 4,
    "codebook_size": CODES,
    "in_channels": 8,
    "block_out_channels": (8,),
    "num_res_blocks": 1,
    "block_num_heads": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
SMALL_TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "codebook_size": CODES,
    "num_vq_tokens": math.prod(GRID),
    "max_position_embeddings": math.prod(GRID) + 1,
}
CLIP = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "projection_dim": 12,
    "bos_token_id": len(WORDS) - 2,
    "eos_token_id": len(WORDS) - 1,
    "pad_token_id": len(WORDS) - 1,
}


def randomized(model, seed=0):
    """The model with every weight moved, so that nothing is zero and all it is given matters."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.state_dict().values():
        weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def make_tokenizer():
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)


def make_encoder(kind="CLIPTextModelWithProjection"):
    model = getattr(transformers, kind)(transformers.CLIPTextConfig(**CLIP))
    return TextEncoder(randomized(model), make_tokenizer())


def make_vq():
    return randomized(VQGANModel(**SMALL_VQ))


def make_pipeline():
    """A text pipeline as aMUSEd's, of 8 x 8 codes and 16 x 16 pixels."""
    settings = PipelineSettings(grid=GRID)
    uvit = randomized(MaskGiTUViT(**SMALL_UVIT))
    return MusePipeline(make_vq(), uvit, make_encoder(), settings=settings)


def make_class_pipeline():
    """The same of three classes."""
    transformer = randomized(MaskGitTransformer(**SMALL_TRANSFORMER, num_classes=3))
    settings = PipelineSettings(class_names=["a", "b", "c"])
    return MusePipeline(make_vq(), transformer, settings=settings)


def draw_image(size=(SIZE, SIZE), seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
