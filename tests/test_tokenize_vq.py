"""The interface of every VQ model and its files. (Parity with recordings: test_parity.py.)"""

import json

import pytest
import torch

from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq.amused_vq import save_amused_vq
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.movq import MOVQ
from tokenize_stage.vq.paella_vq import PaellaVQModel
from tokenize_stage.vq.vqgan import VQGANModel

SMALL = {
    "resolution": 16,
    "hidden_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "z_channels": 4,
    "quantized_embed_dim": 4,
    "num_embeddings": 32,
}
PAELLA = {"levels": 1, "bottleneck_blocks": 2, "c_hidden": 16, "codebook_size": 32}
MODELS = {
    MaskGitVQGAN: SMALL,
    VQGANModel: {**SMALL, "attn_resolutions": (8,)},
    MOVQ: {**SMALL, "attn_resolutions": (8,)},
    PaellaVQModel: PAELLA,
}


def small_vq(model_class, seed=0, **fields):
    """A model with 2 x 2 pixels a code, 32 codes, and random weights that all have an effect."""
    torch.manual_seed(seed)
    vq = model_class(**MODELS[model_class], **fields).eval()
    torch.nn.init.normal_(vq.quantizer.vectors, std=0.3)
    for name, parameter in vq.named_parameters():
        if name.endswith("gammas"):
            torch.nn.init.normal_(parameter)
    return vq


@pytest.fixture(params=MODELS, ids=lambda model_class: model_class.__name__)
def vq(request):
    return small_vq(request.param)


def random_pixels(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_encode_and_decode_speak_codes_and_pixels(vq):
    pixels = random_pixels(2, 3, 16, 16)
    codes = vq.encode(pixels)
    assert codes.shape == (2, 64) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < vq.codebook_size == vq.num_embeddings == 32
    assert len(codes.unique()) > 5
    assert vq.grid(16) == (8, 8) and vq.grid(12, 20) == (6, 10) and vq.reduction == 2
    rebuilt = vq.decode(codes)
    assert rebuilt.shape == pixels.shape
    assert torch.equal(vq.get_code(pixels), codes)
    assert torch.equal(vq.decode_code(codes), rebuilt)


def test_decode_latents_takes_what_encode_latents_gives(vq):
    pixels = random_pixels(2, 3, 16, 16)
    quantized, codes = vq.encode_latents(pixels)
    assert quantized.shape == (2, 4, 8, 8) and torch.equal(codes, vq.encode(pixels))
    rebuilt = vq.decode(codes)
    assert torch.allclose(vq.decode_latents(quantized), rebuilt, atol=1e-5)
    straight, same_codes, loss = vq.encode_latents(pixels, return_loss=True)
    assert torch.equal(same_codes, codes) and loss.ndim == 0 and loss > 0
    assert torch.allclose(straight, quantized, atol=1e-6)
    with torch.no_grad():  # what comes first of a forward pass is the reconstruction, in all
        first = vq(pixels) if isinstance(vq, PaellaVQModel) else vq(pixels)[0]
    assert torch.allclose(first, rebuilt, atol=1e-5)
    assert torch.equal(vq(pixels, return_loss=True)[-1], loss)


def test_a_grid_that_is_not_square(vq):
    pixels = random_pixels(1, 3, 12, 20)
    codes = vq.encode(pixels)
    assert vq.decode(codes.view(1, 6, 10)).shape == pixels.shape
    with pytest.raises(ValueError, match="60 codes are no square grid"):
        vq.decode(codes)


def test_codes_do_not_depend_on_the_batch_size(vq):
    pixels = random_pixels(7, 3, 16, 16)
    one_by_one = torch.cat([vq.encode(image[None]) for image in pixels])
    assert torch.equal(vq.encode(pixels), one_by_one)
    assert torch.equal(vq.encode(pixels[2:5]), one_by_one[2:5])


def test_soft_codes_are_probabilities_whose_peak_is_the_code(vq):
    pixels = random_pixels(2, 3, 16, 16)
    soft, codes = vq.get_soft_code(pixels, temp=0.5)
    assert soft.shape == (2, 64, 32) and torch.allclose(soft.sum(dim=2), torch.ones(2, 64))
    assert torch.equal(codes, vq.encode(pixels)) and torch.equal(soft.argmax(dim=2), codes)
    draws = [
        vq.get_soft_code(pixels, 100.0, True, torch.Generator().manual_seed(seed))[1]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_channels_last_gives_the_same(vq):
    pixels = random_pixels(2, 3, 16, 16)
    codes = vq.encode(pixels)
    rebuilt = vq.decode(codes)
    vq.to(memory_format=torch.channels_last)
    assert torch.equal(vq.encode(pixels.contiguous(memory_format=torch.channels_last)), codes)
    assert torch.allclose(vq.decode(codes), rebuilt, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(vq, dtype):
    pixels = random_pixels(2, 3, 16, 16)
    codes = vq.encode(pixels)
    rebuilt = vq.decode(codes)
    with torch.autocast("cpu", dtype):
        assert (vq.encode(pixels) == codes).float().mean() > 0.9
        assert torch.equal(vq.get_soft_code(pixels)[1], vq.encode(pixels))  # both in float32
        assert (vq.decode(codes) - rebuilt).abs().max() < 0.1 * rebuilt.abs().max()
    vq.to(dtype)
    assert (vq.encode(pixels.to(dtype)) == codes).float().mean() > 0.9
    quantized, _, loss = vq.encode_latents(pixels.to(dtype), return_loss=True)
    assert quantized.dtype == dtype and loss.dtype == torch.float32
    assert vq.decode(codes).dtype == dtype
    assert (vq.decode(codes) - rebuilt).abs().max() < 0.1 * rebuilt.abs().max()


@pytest.mark.parametrize("model_class", [MOVQ, PaellaVQModel])
def test_encode_and_decode_compile_into_one_graph(model_class):
    vq = small_vq(model_class).requires_grad_(False)
    pixels = random_pixels(2, 3, 16, 16)
    codes = torch.compile(vq.encode, backend="eager", fullgraph=True)(pixels)
    assert torch.equal(codes, vq.encode(pixels))
    rebuilt = torch.compile(vq.decode, backend="eager", fullgraph=True)(codes)
    assert torch.equal(rebuilt, vq.decode(codes))


def test_pixels_that_are_none_are_refused_in_words(vq):
    pixels = random_pixels(2, 3, 16, 16)
    wrong = {
        r"\(8-bit images: pixels.float\(\) / 255\), not torch.uint8": (pixels * 255).byte(),
        r"\(B, 3, H, W\), not torch.float32 of shape \(2, 1, 16, 16\)": pixels[:, :1],
        r"\(B, 3, H, W\), not torch.float32 of shape \(3, 16, 16\)": pixels[0],
    }
    for message, tensor in wrong.items():
        for method in (vq.encode, vq.encode_latents, vq.get_soft_code, vq):
            with pytest.raises(ValueError, match=message):
                method(tensor)


def test_encode_refuses_to_lose_a_part_of_the_image(vq):
    with pytest.raises(ValueError, match="17 x 16 pixels.*multiples of 2.*for instance to 16 x 16"):
        vq.encode(random_pixels(1, 3, 17, 16))
    with pytest.raises(ValueError, match="1 x 20 pixels.*for instance to 2 x 20"):
        vq.encode(random_pixels(1, 3, 1, 20))


def test_decode_refuses_latents_and_names_the_method_for_them(vq):
    with pytest.raises(ValueError, match="decode_latents"):
        vq.decode(torch.zeros(1, 4, 8, 8))


def test_save_and_load_give_the_same_model(vq, tmp_path):
    pixels = random_pixels(2, 3, 16, 16)
    vq.train().save_pretrained(tmp_path / "vq")
    loaded = load_vq_model(tmp_path / "vq")
    assert type(loaded) is type(vq) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config == vq.config
    assert all(torch.equal(a, b) for a, b in zip(vq.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(loaded.encode(pixels), vq.eval().encode(pixels))


def save_as_published(vq, folder, **extra):
    """The layout of the hub's checkpoints: config.json and pytorch_model.bin."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(vq.config_dict() | extra))
    torch.save(vq.state_dict(), folder / "pytorch_model.bin")


def test_a_published_checkpoint_loads_and_its_unknown_config_keys_are_ignored(vq, tmp_path):
    extra = {"decay": 0.99, "_name_or_path": "x", "new_key": [1]}
    save_as_published(vq, tmp_path / "hub" / "vq", **extra)
    loaded = load_vq_model(tmp_path / "hub", subfolder="vq")
    pixels = random_pixels(1, 3, 16, 16)
    assert type(loaded) is type(vq) and torch.equal(loaded.encode(pixels), vq.encode(pixels))
    with pytest.raises(TypeError, match="new_key"):
        type(vq)(new_key=[1])


def test_a_diffusers_vqmodel_loads_as_vqganmodel(tmp_path):
    vq, pixels = VQGANModel(**SMALL, attn_resolutions=()).eval(), random_pixels(1, 3, 16, 16)
    save_amused_vq(vq, tmp_path / "pipeline" / "vqvae")
    loaded = load_vq_model(tmp_path / "pipeline", subfolder="vqvae")
    assert type(loaded) is VQGANModel and not loaded.training
    assert torch.equal(loaded.encode(pixels), vq.encode(pixels))


def test_loading_is_strict(tmp_path):
    vq = small_vq(MaskGitVQGAN)
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

    save_as_published(small_vq(MaskGitVQGAN), tmp_path / "vq")
    torch.save({"encoder.conv_in.weight": Evil()}, tmp_path / "vq" / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        load_vq_model(tmp_path / "vq")
    assert not (tmp_path / "ran").exists()


def test_a_model_of_another_class_is_refused_by_name(tmp_path):
    save_as_published(small_vq(MaskGitVQGAN), tmp_path / "vq", _class_name="AutoencoderKL")
    with pytest.raises(ValueError, match="AutoencoderKL.*MaskGitVQGAN.*VQGANModel.*MOVQ.*Paella"):
        load_vq_model(tmp_path / "vq")


@pytest.mark.parametrize(
    "model_class, fields, word",
    [
        (MaskGitVQGAN, {"z_channels": 8}, "quantized_embed_dim 256"),
        (MaskGitVQGAN, {"hidden_channels": 48}, "32"),
        (VQGANModel, {"hidden_channels": 48}, "32"),
        (MOVQ, {"hidden_channels": 48}, "32"),
    ],
)
def test_impossible_configs_are_refused(model_class, fields, word):
    with pytest.raises(ValueError, match=word):
        model_class(**fields)
