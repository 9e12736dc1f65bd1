"""Small models, conditions for them, decoding spelled out, and a model that remembers its input."""

import torch

from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.objective.mask_schedule import get_mask_schedule

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
CODES = dict(codebook_size=60, num_vq_tokens=16, initializer_range=0.2)
TEXT = dict(add_cross_attention=True, encoder_hidden_size=24)
UVIT = dict(
    cond_embed_dim=20, micro_cond_encode_dim=8, micro_cond_embed_dim=40, encoder_hidden_size=24,
    vocab_size=64, codebook_size=60, in_channels=24, block_out_channels=(24,), num_res_blocks=1,
    block_num_heads=3,
)  # fmt: skip


def class_model():
    torch.manual_seed(0)
    return MaskGitTransformer(**SIZES, **CODES, num_classes=10).eval()


def text_model():
    torch.manual_seed(0)
    return MaskGitTransformer(**SIZES, **CODES, **TEXT).eval()


def uvit_model():
    torch.manual_seed(0)
    model = MaskGiTUViT(**SIZES, **UVIT).eval()
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


def partly_masked(model, rows, length=16):
    """Codes with 3, 4, 5 … masks a row."""
    ids = torch.randint(0, 60, (rows, length), generator=seeded(5))
    order = torch.rand(rows, length, generator=seeded(6)).argsort(-1)
    return ids.masked_fill(order < torch.arange(rows).unsqueeze(1) + 3, model.mask_token_id)


def plain_decoding(
    predict, ids, mask_id, temperatures, generator, schedule="cosine", share=1.0, judge=None
):
    """Parallel decoding as SPEC 8 spells it: everything everywhere, torch.multinomial.

    predict(ids, what was most probable at the step before); judge: odds of codes, if there is one.
    """
    schedule, steps, unknown = get_mask_schedule(schedule), len(temperatures), ids == mask_id
    previous = likely = torch.full_like(ids, mask_id)
    for step in range(steps):
        probabilities = predict(ids, previous)[..., :60].softmax(-1)
        hidden = ids == mask_id
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view_as(ids)
        codes = torch.where(hidden, drawn, ids)
        if step == steps - 1:
            return codes
        left = (ids.shape[1] * (share * schedule(torch.tensor((step + 1) / steps)))).floor()
        left = (hidden.sum(-1, keepdim=True) - 1).minimum(left).clamp(min=1).long()
        chosen = probabilities.gather(-1, codes.clamp(max=59).unsqueeze(-1)).squeeze(-1)
        chosen = chosen if judge is None else judge(codes)
        may_hide = hidden if judge is None else unknown
        chosen = chosen.masked_fill(~may_hide, torch.finfo(torch.float32).max)
        uniform = torch.rand(ids.shape, generator=generator).clamp(min=1e-20)
        confidence = chosen.clamp(min=1e-20).log() - temperatures[step] * (
            (-uniform.log()).clamp(min=1e-20).log()
        )
        cut = confidence.sort(-1).values.gather(-1, left)
        ids = torch.where(confidence < cut, mask_id, codes)
        likely = torch.where(hidden, probabilities.argmax(-1), likely)
        previous = torch.where(confidence < cut, likely, mask_id)
    return ids


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
