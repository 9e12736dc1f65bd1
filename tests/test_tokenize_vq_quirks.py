"""What is particular to one VQ model, and the names and shapes of the published checkpoints."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from storage.pretrained import model_fingerprint
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.movq import MOVQ
from tokenize_stage.vq.paella_vq import PaellaVQModel
from tokenize_stage.vq.vqgan import VQGANModel

CLASSES = {c.__name__: c for c in (MaskGitVQGAN, VQGANModel, MOVQ, PaellaVQModel)}
PUBLISHED = {
    path.stem: content
    for path in sorted((Path(__file__).parent / "data" / "published_keys").glob("*.json"))
    if (content := json.loads(path.read_text()))["class"] in CLASSES
}
SMALL = {
    "resolution": 16,
    "hidden_channels": 32,
    "channel_mult": (1, 1),
    "num_res_blocks": 1,
    "z_channels": 4,
    "quantized_embed_dim": 4,
    "num_embeddings": 32,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(name):
    published = PUBLISHED[name]
    with torch.device("meta"):
        vq = CLASSES[published["class"]].from_config(published["config"])
    shapes = {name: list(tensor.shape) for name, tensor in vq.state_dict().items()}
    assert shapes == published["shapes"]
    assert f"f{vq.reduction}" in name  # maskgit-vqgan-imagenet-f16-256, …
    config = vq.config_dict()  # what we write: the keys that the original knows, and no other
    assert json.loads(json.dumps(config)) == published["config"]


def test_every_published_vq_model_is_held():
    assert {content["class"] for content in PUBLISHED.values()} == set(CLASSES)


def attention_calls(vq, pixels):
    """The names of the attention blocks that are applied, in order."""
    called = []
    for name, module in vq.named_modules():
        if name.split(".")[-1] == "attn_1" or ".attn." in name and name.split(".")[-1].isdigit():
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    vq.decode_latents(vq.encode_latents(pixels)[0])
    return called


@pytest.mark.parametrize("model_class", [VQGANModel, MOVQ])
def test_a_lone_attention_block_is_made_but_not_applied(model_class):
    vq = model_class(**SMALL, attn_resolutions=(8,)).eval()
    assert "encoder.down.1.attn.0.q.weight" in vq.state_dict()
    decoder = ["decoder.mid.attn_1", "decoder.up.1.attn.0", "decoder.up.1.attn.1"]
    assert attention_calls(vq, torch.rand(1, 3, 16, 16)) == ["encoder.mid.attn_1", *decoder]


def test_attention_is_placed_by_the_configured_resolution_not_by_the_images():
    fields = SMALL | {"num_res_blocks": 2, "no_attn_mid_block": True}
    vq = VQGANModel(**fields, attn_resolutions=(8,)).eval()
    levels = {name.rpartition(".")[0] for name in attention_calls(vq, torch.rand(1, 3, 64, 32))}
    assert levels == {"encoder.down.1.attn", "decoder.up.1.attn"}
    odd = VQGANModel(**fields | {"resolution": 17}, attn_resolutions=(17, 8))
    assert len(odd.encoder.down[0].attn) == len(odd.encoder.down[1].attn) == 2
    assert len(odd.decoder.up[1].attn) == 3  # the decoder counts 8, 16: up from the coarsest
    assert len(odd.decoder.up[0].attn) == 0


def test_symmetric_pixels_are_rescaled_at_both_ends():
    torch.manual_seed(0)
    plain = VQGANModel(**SMALL).eval()
    taming = VQGANModel(**SMALL, symmetric_pixels=True).eval()
    taming.load_state_dict(plain.state_dict())
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(taming.latents(pixels), plain.latents(2 * pixels - 1))
    codes = taming.encode(pixels)
    assert torch.allclose(taming.decode(codes), (plain.decode(codes) + 1) / 2)
    assert taming.config_dict()["symmetric_pixels"] is True
    assert "symmetric_pixels" not in plain.config_dict()
    assert VQGANModel.from_config(taming.config_dict()).config.symmetric_pixels
    assert model_fingerprint(taming) != model_fingerprint(plain)


def test_movq_returns_two_and_its_norms_see_the_quantized_tensor_itself():
    torch.manual_seed(0)
    vq, pixels = MOVQ(**SMALL).eval(), torch.rand(2, 3, 16, 16)
    reconstruction, codes = vq(pixels)
    assert reconstruction.shape == pixels.shape and torch.equal(codes, vq.encode(pixels))
    assert len(vq(pixels, return_loss=True)) == 3  # open-muse crashes here
    norm, x, quantized = vq.decoder.norm_out, torch.randn(2, 32, 16, 16), torch.randn(2, 4, 8, 8)
    repeated = F.interpolate(quantized, size=(16, 16), mode="nearest")
    wanted = norm.norm_layer(x) * norm.conv_y(repeated) + norm.conv_b(repeated)
    assert torch.allclose(norm(x, quantized), wanted, atol=1e-5)
    seen = []
    norm.register_forward_hook(lambda _, args, __: seen.append(args[1]))
    vq.decode_latents(quantized)
    assert seen[0] is quantized


def test_paella_scales_latents_but_not_codes():
    torch.manual_seed(0)
    vq = PaellaVQModel(levels=2, bottleneck_blocks=1, c_hidden=16, codebook_size=32).eval()
    torch.nn.init.normal_(vq.quantizer.vectors)
    pixels = torch.rand(1, 3, 16, 16)
    quantized, codes = vq.encode_latents(pixels)
    assert torch.allclose(quantized * 0.3764, vq.lookup(codes), atol=1e-6)
    assert torch.equal(vq.decode(codes), vq.pixels(vq.lookup(codes)))
    assert torch.is_tensor(vq(pixels)) and len(vq(pixels, return_loss=True)) == 2
    norm = vq.down_blocks[-1][1]
    assert not norm.training and norm.eps == 1e-5
    before = norm.running_mean.clone()
    vq.encode(pixels)
    assert torch.equal(norm.running_mean, before)
