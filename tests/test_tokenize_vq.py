"""The VQ models' interface, files and code search. (Parity with recordings: test_parity.py.)"""

import json

import pytest
import torch

from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.quantizer import VectorQuantizer, nearest_codes

SMALL = {
    "resolution": 16,
    "hidden_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "z_channels": 4,
    "quantized_embed_dim": 4,
    "num_embeddings": 32,
}
# Channels of the published checkpoint's levels, encoder and decoder, finest first.
PUBLISHED = (128, 128, 256, 256, 512)


def small_vqgan(seed=0):
    torch.manual_seed(seed)
    vq = MaskGitVQGAN(**SMALL).eval()
    torch.nn.init.normal_(vq.quantize.embedding.weight, std=0.3)
    return vq


def random_pixels(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def res_block_shapes(prefix, c_in, c_out):
    shapes = {f"{prefix}.norm1.{w}": (c_in,) for w in ("weight", "bias")}
    shapes |= {f"{prefix}.norm2.{w}": (c_out,) for w in ("weight", "bias")}
    shapes[f"{prefix}.conv1.weight"] = (c_out, c_in, 3, 3)
    shapes[f"{prefix}.conv2.weight"] = (c_out, c_out, 3, 3)
    if c_in != c_out:  # the published quirk: it reads the result of conv2
        shapes[f"{prefix}.nin_shortcut.weight"] = (c_out, c_out, 1, 1)
    return shapes


def published_shapes():
    """Names and shapes in openMUSE/maskgit-vqgan-imagenet-f16-256, 168 tensors."""
    shapes = {"quantize.embedding.weight": (1024, 256)}
    shapes |= {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.conv_out.weight": (256, 512, 1, 1),
    }
    shapes |= {"encoder.conv_out.bias": (256,), "decoder.conv_in.weight": (512, 256, 3, 3)}
    shapes |= {"decoder.conv_in.bias": (512,), "decoder.conv_out.weight": (3, 128, 3, 3)}
    shapes["decoder.conv_out.bias"] = (3,)
    for part, width in (("encoder", 512), ("decoder", 128)):
        shapes |= {f"{part}.norm_out.{w}": (width,) for w in ("weight", "bias")}
        for block in range(2):
            shapes |= res_block_shapes(f"{part}.mid.{block}", 512, 512)
    for level, width in enumerate(PUBLISHED):
        finer, coarser = PUBLISHED[max(level - 1, 0)], PUBLISHED[min(level + 1, 4)]
        for block in range(2):
            down, up = (finer, coarser) if block == 0 else (width, width)
            shapes |= res_block_shapes(f"encoder.down.{level}.block.{block}", down, width)
            shapes |= res_block_shapes(f"decoder.up.{level}.block.{block}", up, width)
        if level > 0:
            shapes[f"decoder.up.{level}.upsample_conv.weight"] = (width, width, 3, 3)
            shapes[f"decoder.up.{level}.upsample_conv.bias"] = (width,)
    return shapes


def test_default_config_has_the_published_parameters():
    with torch.device("meta"):
        vq = MaskGitVQGAN()
    shapes = {name: tuple(tensor.shape) for name, tensor in vq.state_dict().items()}
    assert shapes == published_shapes()
    assert len(shapes) == 168 and sum(t.numel() for t in vq.parameters()) == 54_515_587
    assert (vq.codebook_size, vq.reduction, vq.grid(256)) == (1024, 16, (16, 16))


def test_encode_and_decode_speak_codes_and_pixels():
    vq, pixels = small_vqgan(), random_pixels(2, 3, 16, 16)
    codes = vq.encode(pixels)
    assert codes.shape == (2, 64) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < vq.codebook_size == 32
    assert vq.grid(16) == (8, 8) and vq.reduction == 2
    rebuilt = vq.decode(codes)
    assert rebuilt.shape == pixels.shape
    assert torch.equal(vq.get_code(pixels), codes)
    assert torch.equal(vq.decode_code(codes), rebuilt)


def test_forward_is_encode_latents_then_decode_latents():
    vq, pixels = small_vqgan(), random_pixels(2, 3, 16, 16)
    rebuilt, quantized, codes = vq(pixels)
    assert torch.equal(codes, vq.encode(pixels))
    assert torch.allclose(rebuilt, vq.decode(codes), atol=1e-6)
    assert torch.allclose(rebuilt, vq.decode_latents(quantized))
    assert len(vq(pixels, return_loss=True)) == 4
    assert len(vq.encode_latents(pixels, return_loss=True)) == 3


def test_decode_of_a_grid_that_is_not_square():
    vq = small_vqgan()
    codes = vq.encode(random_pixels(1, 3, 12, 20))  # a grid of 6 x 10
    assert vq.decode(codes.view(1, 6, 10)).shape == (1, 3, 12, 20)
    with pytest.raises(ValueError, match="60 codes are no square grid"):
        vq.decode(codes)


def test_decode_refuses_latents_and_names_the_method_for_them():
    vq = small_vqgan()
    with pytest.raises(ValueError, match="decode_latents"):
        vq.decode(torch.zeros(1, 4, 8, 8))


def test_codes_do_not_depend_on_the_batch_size():
    vq, pixels = small_vqgan(), random_pixels(7, 3, 16, 16)
    one_by_one = torch.cat([vq.encode(image[None]) for image in pixels])
    assert torch.equal(vq.encode(pixels), one_by_one)
    assert torch.equal(vq.encode(pixels[2:5]), one_by_one[2:5])


@pytest.mark.parametrize("dim", [4, 64])
def test_nearest_codes_is_the_nearest_in_float64(dim):
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(5000, dim, generator=generator)
    codebook = torch.randn(1000, dim, generator=generator)
    exact = torch.cdist(vectors.double(), codebook.double())
    chosen = exact.gather(1, nearest_codes(vectors, codebook)[:, None])[:, 0]
    assert (chosen - exact.min(dim=1).values).max() < 1e-5


def test_nearest_codes_takes_the_first_of_equals():
    generator = torch.Generator().manual_seed(3)
    half = torch.randn(50, 8, generator=generator)
    vectors = torch.randn(4000, 8, generator=generator)
    codes = nearest_codes(vectors, torch.cat([half, half]))
    assert codes.max() < 50
    assert torch.equal(codes, nearest_codes(vectors, half))
    assert torch.equal(nearest_codes(vectors, torch.zeros(9, 8)), torch.zeros_like(codes))


def test_nearest_codes_are_searched_in_float32_under_autocast():
    generator = torch.Generator().manual_seed(4)
    vectors = torch.randn(2000, 16, generator=generator)
    codebook = torch.randn(500, 16, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        codes = nearest_codes(vectors, codebook)
    assert torch.equal(codes, nearest_codes(vectors, codebook))


def test_loss_weighs_the_codebook_term_and_gradients_pass_straight_through():
    torch.manual_seed(5)
    quantizer = VectorQuantizer(8, 4, commitment_cost=0.25)
    latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    quantized, codes, loss = quantizer(latents, return_loss=True)
    error = (latents - quantizer.lookup(codes, (3, 3))).detach()
    assert loss.item() == pytest.approx(1.25 * error.square().mean().item(), rel=1e-6)
    to_latents, to_codebook = torch.autograd.grad(loss, [latents, quantizer.embedding.weight])
    assert torch.allclose(to_latents, 2 * error / error.numel(), atol=1e-7)  # weight 1
    at_latents = -0.25 * 2 * error / error.numel()  # the quirk: the codebook's weight is 0.25
    wanted = torch.zeros(8, 4).index_add_(
        0, codes.flatten(), at_latents.permute(0, 2, 3, 1).reshape(-1, 4)
    )
    assert torch.allclose(to_codebook, wanted, atol=1e-7)
    weights = torch.randn(quantized.shape)
    straight = quantizer(latents, return_loss=True)[0]
    assert torch.equal(torch.autograd.grad((straight * weights).sum(), latents)[0], weights)


def test_soft_codes_are_probabilities_whose_peak_is_the_code():
    vq, pixels = small_vqgan(), random_pixels(2, 3, 16, 16)
    soft, codes = vq.get_soft_code(pixels, temp=0.5)
    assert soft.shape == (2, 64, 32) and torch.allclose(soft.sum(dim=2), torch.ones(2, 64))
    assert torch.equal(codes, vq.encode(pixels)) and torch.equal(soft.argmax(dim=2), codes)
    draws = [
        vq.get_soft_code(pixels, 100.0, True, torch.Generator().manual_seed(seed))[1]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_save_and_load_give_the_same_model(tmp_path):
    vq, pixels = small_vqgan(), random_pixels(2, 3, 16, 16)
    vq.train().save_pretrained(tmp_path / "vq")
    loaded = load_vq_model(tmp_path / "vq")
    assert isinstance(loaded, MaskGitVQGAN) and not loaded.training
    assert loaded.config == vq.config
    assert all(torch.equal(a, b) for a, b in zip(vq.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(loaded.encode(pixels), vq.eval().encode(pixels))


def save_as_published(vq, folder, **extra):
    """The layout of the hub's checkpoints: config.json and pytorch_model.bin."""
    folder.mkdir()
    config = {"_class_name": "MaskGitVQGAN", "_version": "0.0.1", **SMALL, **extra}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(vq.state_dict(), folder / "pytorch_model.bin")


def test_a_published_checkpoint_loads_and_its_unknown_config_keys_are_ignored(tmp_path):
    vq = small_vqgan()
    (tmp_path / "hub").mkdir()
    save_as_published(vq, tmp_path / "hub" / "vq", decay=0.99, _name_or_path="x", new_key=[1])
    loaded = load_vq_model(tmp_path / "hub", subfolder="vq")
    pixels = random_pixels(1, 3, 16, 16)
    assert torch.equal(loaded.encode(pixels), vq.encode(pixels))
    with pytest.raises(TypeError, match="new_key"):
        MaskGitVQGAN(**SMALL, new_key=[1])


def test_loading_is_strict(tmp_path):
    vq = small_vqgan()
    save_as_published(vq, tmp_path / "vq")
    state = vq.state_dict()
    del state["encoder.norm_out.bias"]
    state["encoder.norm_out.beta"] = torch.zeros(64)
    state["quantize.embedding.weight"] = torch.zeros(33, 4)
    torch.save(state, tmp_path / "vq" / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load_vq_model(tmp_path / "vq")
    for word in ("encoder.norm_out.bias", "encoder.norm_out.beta", "(33, 4)", "(32, 4)"):
        assert word in str(error.value)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    save_as_published(small_vqgan(), tmp_path / "vq")
    torch.save({"encoder.conv_in.weight": Evil()}, tmp_path / "vq" / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        load_vq_model(tmp_path / "vq")
    assert not (tmp_path / "ran").exists()


def test_a_model_of_another_class_is_refused_by_name(tmp_path):
    save_as_published(small_vqgan(), tmp_path / "vq", _class_name="AutoencoderKL")
    with pytest.raises(ValueError, match="AutoencoderKL.*MaskGitVQGAN"):
        load_vq_model(tmp_path / "vq")


@pytest.mark.parametrize(
    "fields, word",
    [({"z_channels": 8}, "quantized_embed_dim 256"), ({"hidden_channels": 48}, "32")],
)
def test_impossible_configs_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        MaskGitVQGAN(**fields)
