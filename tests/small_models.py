"""Small models of every kind, conditions for them, and one that remembers what it was given."""

import torch

from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
CODES = dict(codebook_size=60, num_vq_tokens=16, initializer_range=0.2)


def class_model():
    torch.manual_seed(0)
    return MaskGitTransformer(**SIZES, **CODES, num_classes=10).eval()


def text_model():
    torch.manual_seed(0)
    return MaskGitTransformer(
        **SIZES, **CODES, add_cross_attention=True, encoder_hidden_size=24
    ).eval()


def uvit_model():
    torch.manual_seed(0)
    model = MaskGiTUViT(
        **SIZES, cond_embed_dim=20, micro_cond_encode_dim=8, micro_cond_embed_dim=40,
        encoder_hidden_size=24, vocab_size=64, codebook_size=60, in_channels=24,
        block_out_channels=(24,), num_res_blocks=1, block_num_heads=3,
    ).eval()  # fmt: skip
    for parameter in model.parameters():  # of its own it starts with zeros that hide differences
        torch.nn.init.normal_(parameter, std=0.3)
    model.embed.conv.weight.data *= 10
    model.mlm_layer.conv2.weight.data *= 5
    return model


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def text_condition(rows):
    return {"encoder_hidden_states": torch.randn(rows, 5, 24, generator=seeded(7))}


def uvit_condition(rows):
    return text_condition(rows) | {
        "cond_embeds": torch.randn(rows, 20, generator=seeded(8)),
        "micro_conds": torch.rand(1, 5, generator=seeded(9)) * 100,
    }


def uvit_negative():
    return {
        "negative_embeds": torch.randn(1, 5, 24, generator=seeded(3)),
        "negative_cond_embeds": torch.randn(1, 20, generator=seeded(4)),
    }


class Recorder:
    """A model that remembers what it was given."""

    def __init__(self, model):
        self.model, self.inputs, self.contexts, self.heads = model, [], [], []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def context(self, **condition):
        self.contexts.append(condition)
        return self.model.context(**condition)

    def hidden_states(self, ids, context, **options):
        self.inputs.append(ids.clone())
        return self.model.hidden_states(ids, context=context, **options)

    def head(self, hidden):
        self.heads.append(hidden.shape[:2])
        return self.model.head(hidden)
