"""Converters of VQ models: diffusers' VQModel both ways, taming's and MaskGIT's checkpoints."""

import json
import os
import subprocess
from argparse import Namespace
from collections import defaultdict
from pathlib import Path, PurePosixPath

import pytest
import torch

from storage.interchange import backwards, rename
from tokenize_stage.vq.amused_vq import (
    config_from_amused,
    config_to_amused,
    load_amused_vq,
    name_pairs,
    save_amused_vq,
    state_from_amused,
    state_to_amused,
)
from tokenize_stage.vq.maskgit_jax import load_maskgit_jax
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.taming import load_taming
from tokenize_stage.vq.vqgan import VQGANModel

DATA = Path(__file__).parent / "data"
SMALL = {
    "resolution": 16,
    "hidden_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (),
    "z_channels": 4,
    "quantized_embed_dim": 4,
    "num_embeddings": 32,
}


def random_model(model_class, **fields):
    """A model of which every weight is random: norms and biases, too."""
    torch.manual_seed(0)
    model = model_class(**SMALL | fields).eval().requires_grad_(False)
    for weight in model.state_dict().values():
        weight.add_(0.1 * torch.randn(weight.shape))
    return model


def published(name):
    keys = json.loads((DATA / "published_keys" / f"{name}.json").read_text())
    tensors = {n: torch.empty(shape, device="meta") for n, shape in keys["shapes"].items()}
    return keys["config"], tensors


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("size", [256, 512])
def test_published_names_and_configs_map_both_ways(size):
    their_config, theirs = published(f"amused-{size}_vqvae")
    our_config, ours = published("vqgan-f16-8192-laion")
    assert shapes(state_from_amused(theirs)) == shapes(ours)
    assert shapes(state_to_amused(ours)) == shapes(theirs)
    key_map = json.loads((DATA / "amused_key_map.json").read_text())["vqvae"]
    assert rename(theirs, backwards(name_pairs(5))) == {a: b for a, (b,) in key_map.items()}
    assert VQGANModel.config_class(**config_from_amused(their_config)) == VQGANModel.config_class(
        **{key: value for key, value in our_config.items() if key[0] != "_"}
        | {"channel_mult": (1, 2, 2, 4, 6), "attn_resolutions": ()}
    )
    unused = {"sample_size": 32, "scaling_factor": 0.18215}  # by the VQ model; diffusers' defaults
    assert config_to_amused(our_config) | unused == their_config


@pytest.mark.parametrize("attention", [False, True], ids=["plain", "attention"])
def test_diffusers_computes_the_same(tmp_path, attention):
    diffusers = pytest.importorskip("diffusers")
    ours = random_model(VQGANModel, no_attn_mid_block=not attention, quantized_embed_dim=6)
    save_amused_vq(ours, tmp_path / "exported")
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "exported").eval()
    pixels = torch.rand(2, 3, 16, 24)
    latents = theirs.encode(pixels).latents
    torch.testing.assert_close(ours.latents(pixels), latents, rtol=1e-4, atol=1e-4)
    codes = ours.encode(pixels).view(2, 8, 12)
    decoded = theirs.decode(codes, force_not_quantize=True, shape=(2, 8, 12, 6)).sample
    torch.testing.assert_close(ours.decode(codes), decoded, rtol=1e-4, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_amused_vq(tmp_path, subfolder="theirs")
    assert same_state(back.state_dict(), ours.state_dict())
    assert not back.training and not back.quantize.embedding.weight.requires_grad
    assert back.config == VQGANModel(**SMALL | vars(ours.config) | {"resolution": 256}).config


@pytest.mark.parametrize(
    "changed",
    [
        {"norm_type": "spatial"},
        {"act_fn": "gelu"},
        {"norm_num_groups": 16},
        {"out_channels": 4},
        {"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]},
        {"block_out_channels": [64, 96]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_vqmodel_of_another_function_is_refused(changed):
    config = config_to_amused(vars(VQGANModel(**SMALL).config))
    config_from_amused(config)
    with pytest.raises(ValueError, match=next(iter(changed))):
        config_from_amused(config | changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"attn_resolutions": (8,)},
        {"symmetric_pixels": True},
        {"resample_with_conv": False},
        {"channel_mult": (2, 2)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_diffusers_lacks_is_not_exported(tmp_path, changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        save_amused_vq(VQGANModel(**SMALL | changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_other_names_are_listed():
    state = random_model(VQGANModel).state_dict()
    with pytest.raises(ValueError, match="no known name:\n  encoder.extra.weight$"):
        state_to_amused(state | {"encoder.extra.weight": torch.zeros(1)})


class Runs:
    """An object whose pickle says: call this."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class ModelCheckpoint:
    """What Lightning keeps beside weights: a class as a key, objects with state as values."""


def lightning_file(path, model, **beside):
    """A checkpoint as taming's trainer writes it; returns its path."""
    loss = {f"loss.discriminator.main.{i}.weight": torch.randn(4, 3) for i in range(3)}
    loss["loss.perceptual_loss.lin0.model.1.weight"] = torch.randn(1, 4)
    content = {"epoch": 3, "state_dict": {**model.state_dict(), **loss}, **beside}
    torch.save(content, path)
    return path


@pytest.mark.parametrize("attention", [(), (8,)], ids=["plain", "attention"])
def test_a_taming_checkpoint_becomes_the_same_model(tmp_path, attention):
    fields = {"num_res_blocks": 2, "attn_resolutions": attention, "symmetric_pixels": True}
    ours = random_model(VQGANModel, no_attn_mid_block=not attention, **fields)
    loaded, left_out = load_taming(lightning_file(tmp_path / "last.ckpt", ours), resolution=16)
    assert loaded.config == ours.config and not loaded.training
    assert same_state(loaded.state_dict(), ours.state_dict())
    tensors = "4 tensors for training only: loss.discriminator, loss.perceptual_loss"
    assert left_out == ["epoch (beside the weights)", tensors]


@pytest.mark.parametrize("run", [os.system, subprocess.getoutput], ids=["os", "subprocess"])
def test_nothing_in_a_checkpoint_is_run(tmp_path, run):
    mark = tmp_path / "it ran"
    evil = Runs(run, f"touch '{mark}'")
    ours = random_model(VQGANModel, symmetric_pixels=True)
    state = ModelCheckpoint()
    state.monitor, state.folder, state.lists = (
        "val/loss",
        PurePosixPath("/"),
        defaultdict(list, a=[]),
    )
    beside = {
        "callbacks": {ModelCheckpoint: {"best": torch.ones(2), "state": state, "evil": evil}},
        "hyper_parameters": Namespace(lr=1e-4, seen={1, 2}, ckpt_path=evil),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.nn.Parameter(torch.ones(3))}}}],
    }
    path = lightning_file(tmp_path / "last.ckpt", ours, **beside)
    loaded, left_out = load_taming(path, resolution=16)
    assert not mark.exists()
    assert same_state(loaded.state_dict(), ours.state_dict())
    assert "hyper_parameters (beside the weights)" in left_out
    torch.load(path, weights_only=False)  # the file is as bad as it looks
    assert mark.exists()


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        ({"quantize.embedding.weight": "quantize.embed.weight"}, "Gumbel"),
        ({"quant_conv.bias": "quantize.used"}, "renumbers its codes"),
        ({"encoder.conv_in.weight": "first_stage.weight"}, "no 'encoder.conv_in.weight'"),
        ({"decoder.mid.block_1.conv1.bias": "x"}, "missing decoder.mid.block_1.conv1.bias\n.*x"),
    ],
)
def test_checkpoints_of_other_kinds_are_refused(tmp_path, renamed, message):
    state = random_model(VQGANModel).state_dict()
    torch.save({renamed.get(name, name): state[name] for name in state}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        load_taming(tmp_path / "a.ckpt")


def test_attention_that_taming_alone_applies_is_refused(tmp_path):
    one_block = random_model(VQGANModel, attn_resolutions=(8,))
    with pytest.raises(ValueError, match="levels of a single residual block"):
        load_taming(lightning_file(tmp_path / "a.ckpt", one_block), resolution=16)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02}q\x00."])
def test_a_file_without_weights_is_refused(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="a.ckpt"):
        load_taming(tmp_path / "a.ckpt")


def flax_tree(model):
    """The parameters of a MaskGitVQGAN as flax numbers them: by kind, in the order of calls."""

    def conv(layer):
        bias = {} if layer.bias is None else {"bias": layer.bias}
        return {"kernel": layer.weight.permute(2, 3, 1, 0), **bias}

    def norm(layer):
        return {"scale": layer.weight, "bias": layer.bias}

    def res_block(block):
        convolutions = [block.conv1, block.conv2]
        convolutions += [block.nin_shortcut] if hasattr(block, "nin_shortcut") else []
        norms = {"GroupNorm_0": norm(block.norm1), "GroupNorm_1": norm(block.norm2)}
        return norms | {f"Conv_{i}": conv(layer) for i, layer in enumerate(convolutions)}

    def half(blocks, convolutions, last):
        tree = {f"ResBlock_{i}": res_block(block) for i, block in enumerate(blocks)}
        tree |= {f"Conv_{i}": conv(layer) for i, layer in enumerate(convolutions)}
        return tree | {"GroupNorm_0": norm(last)}

    encoder, decoder = model.encoder, model.decoder
    down = [block for level in encoder.down for block in level.block]
    up = [block for level in reversed(decoder.up) for block in level.block]
    ups = [level.upsample_conv for level in reversed(decoder.up[1:])]
    return {
        "encoder": half(
            [*down, *encoder.mid], [encoder.conv_in, encoder.conv_out], encoder.norm_out
        ),
        "decoder": half(
            [*decoder.mid, *up], [decoder.conv_in, *ups, decoder.conv_out], decoder.norm_out
        ),
        "quantizer": {"codebook": model.quantize.embedding.weight},
    }


def flax_file(path, tree):
    """Writes `tree` as flax.serialization.to_bytes does; returns its path."""
    msgpack = pytest.importorskip("msgpack")

    def encode(value):
        array = value.detach().contiguous().numpy()
        content = (array.shape, array.dtype.name, array.tobytes())
        return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))

    path.write_bytes(msgpack.packb(tree, default=encode, strict_types=True))
    return path


@pytest.mark.parametrize("blocks", [1, 2])
def test_maskgits_jax_checkpoint_becomes_the_same_model(tmp_path, blocks):
    ours = random_model(MaskGitVQGAN, num_res_blocks=blocks, channel_mult=(1, 1, 2))
    path = flax_file(tmp_path / "tokenizer", {"params": flax_tree(ours), "step": 7})
    loaded, left_out = load_maskgit_jax(path, resolution=16)
    assert same_state(loaded.state_dict(), ours.state_dict()) and not loaded.training
    attn_resolutions = loaded.config.attn_resolutions  # unused
    assert vars(loaded.config) == vars(ours.config) | {"attn_resolutions": attn_resolutions}
    assert left_out == ["step (beside the weights)"]


def test_jax_checkpoints_that_do_not_fit_are_refused(tmp_path):
    def load(tree):
        return load_maskgit_jax(flax_file(tmp_path / "file", tree))

    good = flax_tree(random_model(MaskGitVQGAN))
    with pytest.raises(ValueError, match="params are encoder, decoder and quantizer: .*'layer_0'"):
        load({"params": {"layer_0": good["encoder"]}})
    with pytest.raises(ValueError, match="no known name:\n  encoder.Dense_0.weight$"):
        load(
            {"params": good | {"encoder": good["encoder"] | {"Dense_0": {"kernel": torch.ones(1)}}}}
        )
    codes = {"codebook": torch.zeros(4, 4, dtype=torch.int32)}
    with pytest.raises(ValueError, match="quantizer.codebook is no array of float32"):
        load({"params": good | {"quantizer": codes}})
    del good["decoder"]["GroupNorm_0"]["scale"]
    with pytest.raises(ValueError, match="missing decoder.norm_out.weight$"):
        load({"params": good})
    (tmp_path / "file").write_bytes(b"\xc1")
    with pytest.raises(ValueError, match="file is no flax checkpoint"):
        load_maskgit_jax(tmp_path / "file")
