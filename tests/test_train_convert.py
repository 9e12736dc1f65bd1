"""aMUSEd's transformer under our names, load_transformer, and the command muse-convert."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.vqgan import VQGANModel
from train_stage.convert import main
from train_stage.models.amused import (
    config_from_amused,
    config_to_amused,
    save_amused_transformer,
    state_from_amused,
    state_to_amused,
)
from train_stage.models.load_transformer import load_transformer
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.pipeline.muse_pipeline import MusePipeline

DATA = Path(__file__).parent / "data"
UVIT = {  # UVit2DModel's keywords
    "hidden_size": 16,
    "cond_embed_dim": 12,
    "micro_cond_encode_dim": 2,
    "micro_cond_embed_dim": 10,
    "encoder_hidden_size": 16,
    "vocab_size": 24,
    "codebook_size": 20,
    "in_channels": 8,
    "block_out_channels": 8,
    "num_res_blocks": 2,
    "block_num_heads": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
VQ = {  # VQModel's
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "num_vq_embeddings": 20,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
}
SMALL_VQ = {  # VQGANModel's
    "hidden_channels": 32,
    "channel_mult": (1, 1),
    "num_res_blocks": 1,
    "attn_resolutions": (),
    "z_channels": 4,
    "quantized_embed_dim": 4,
}


def randomize(model, seed=0):
    """Moves every weight, so that none is still zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.state_dict().values():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def published(name):
    return json.loads((DATA / "published_keys" / f"{name}_transformer.json").read_text())


@pytest.mark.parametrize("size", [256, 512])
def test_published_names_shapes_and_configs_map_both_ways(size):
    theirs, ours = published(f"amused-{size}"), published(f"muse-{size}")
    state = {name: torch.empty(shape, device="meta") for name, shape in theirs["shapes"].items()}
    converted = state_from_amused(state)
    assert {name: list(tensor.shape) for name, tensor in converted.items()} == ours["shapes"]
    back = state_to_amused(converted)
    assert {name: list(tensor.shape) for name, tensor in back.items()} == theirs["shapes"]
    config = MaskGiTUViT.config_class(**config_from_amused(theirs["config"]))
    known = {key: value for key, value in vars(config).items() if key in ours["config"]}
    assert {key: ours["config"][key] for key in known} == known | {"block_out_channels": [768]}
    assert not any(value for key, value in vars(config).items() if key not in known)
    assert config_to_amused(vars(config)) == theirs["config"]


def test_every_name_is_the_one_of_the_checked_key_map():
    key_map = json.loads((DATA / "amused_key_map.json").read_text())["transformer"]
    number = {name: i for i, names in enumerate(key_map.values()) for name in names}
    state = {name: torch.tensor([i]) for name, i in number.items()}
    gates = {name: torch.tensor([-1]) for name in number if ".wi_0." in name}
    found = state_to_amused(state | gates)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: [i] if len(names) == 1 else [i, -1] for i, (name, names) in enumerate(key_map.items())
    }
    assert same_state(state_from_amused(found), state | gates)


@pytest.mark.parametrize(
    "changed",
    [{}, {"downsample": True, "upsample": True}, {"use_bias": True}, {"block_out_channels": 16}],
    ids=["plain", "halved", "bias", "one width"],
)
def test_diffusers_computes_the_same(tmp_path, changed):
    diffusers = pytest.importorskip("diffusers")
    theirs = randomize(diffusers.UVit2DModel(**UVIT | {"sample_size": 4} | changed))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_transformer(tmp_path, subfolder="theirs")
    assert isinstance(ours, MaskGiTUViT) and not ours.training
    codes, text = torch.randint(24, (2, 4, 6)), torch.randn(2, 5, 16)
    pooled, micro = torch.randn(2, 12), torch.tensor([[64.0, 48, 0, 2, 6]] * 2)
    with torch.no_grad():
        wanted = theirs(codes, text, pooled, micro).flatten(2).transpose(1, 2)
        found = ours(codes.flatten(1), text, pooled, micro, grid=(4, 6))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    save_amused_transformer(ours, tmp_path / "back", sample_size=4)
    back, info = diffusers.UVit2DModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert same_state(back.state_dict(), theirs.state_dict()) and not any(info.values())
    config = {key: value for key, value in theirs.config.items() if key[0] != "_"}
    assert {key: value for key, value in back.config.items() if key[0] != "_"} == config


def test_models_of_another_function_are_refused():
    with pytest.raises(ValueError, match="downsample=True, upsample=False"):
        config_from_amused(UVIT | {"downsample": True})
    with pytest.raises(ValueError, match="layer_norm_eps=1e-05"):
        config_from_amused(UVIT | {"layer_norm_eps": 1e-5})
    config = vars(MaskGiTUViT.config_class())
    for key, value in (("use_fused_mlp", True), ("norm_type", "layernorm")):
        with pytest.raises(ValueError, match=f"{key}={value}"):
            config_to_amused(config | {key: value})
    with pytest.raises(ValueError, match="no known name:\n  transformer_layers.0.ffn.wi_0.weight$"):
        state_to_amused({"transformer_layers.0.ffn.wi_0.weight": torch.ones(1)})


def our_uvit(**changed):
    torch.manual_seed(0)
    fields = config_from_amused(UVIT) | changed
    return randomize(MaskGiTUViT(**fields))


def test_load_transformer_goes_by_the_class_name(tmp_path):
    uvit = our_uvit()
    uvit.save_pretrained(tmp_path / "uvit")
    assert same_state(load_transformer(tmp_path / "uvit").state_dict(), uvit.state_dict())
    config = json.loads((tmp_path / "uvit" / "config.json").read_text())
    assert config["_class_name"] == "MaskGiTUViT_v2"
    for name in ("MaskGiTUViT", "VQGANModel", None):
        (tmp_path / "uvit" / "config.json").write_text(json.dumps(config | {"_class_name": name}))
        if name == "MaskGiTUViT":
            assert isinstance(load_transformer(tmp_path / "uvit"), MaskGiTUViT)
            continue
        with pytest.raises(ValueError, match=f"a {name}; .*MaskGitTransformer, .*UVit2DModel"):
            load_transformer(tmp_path / "uvit")
    small = MaskGitTransformer(vocab_size=2048, hidden_size=12, num_hidden_layers=1)
    small.save_pretrained(tmp_path / "maskgit")
    assert isinstance(load_transformer(tmp_path / "maskgit"), MaskGitTransformer)


@pytest.mark.parametrize(
    "changed",
    [{"block_out_channels": [8, 16]}, {"use_position_embeddings": True}, {"ffn_type": "vanilla"}],
    ids=lambda changed: next(iter(changed)),
)
def test_first_version_uvits_are_refused(tmp_path, changed):
    our_uvit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"_class_name": "MaskGiTUViT", "use_position_embeddings": False} | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"first version.*{next(iter(changed))}"):
        load_transformer(tmp_path)


@pytest.fixture(scope="module")
def amused_pipeline(tmp_path_factory):
    """A tiny aMUSEd pipeline with random weights, saved as diffusers saves it."""
    diffusers, transformers = map(pytest.importorskip, ("diffusers", "transformers"))
    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab = {w: i for i, w in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8)
    text_config = transformers.CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=12,
        bos_token_id=len(vocab) - 2,
        eos_token_id=len(vocab) - 1,
        pad_token_id=len(vocab) - 1,
    )
    torch.manual_seed(0)
    pipeline = diffusers.AmusedPipeline(
        vqvae=randomize(diffusers.VQModel(**VQ)),
        tokenizer=tokenizer,
        text_encoder=transformers.CLIPTextModelWithProjection(text_config),
        transformer=randomize(diffusers.UVit2DModel(**UVIT, sample_size=4)),
        scheduler=diffusers.AmusedScheduler(mask_token_id=23, masking_schedule="linear"),
    )
    folder = tmp_path_factory.mktemp("amused") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


def pictures_of(folder):
    """What AmusedPipeline draws from a seed; the size is the pipeline's own."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.AmusedPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    prompts = ["a red cat", "the sea"]
    return pipeline(prompts, num_inference_steps=3, generator=generator, output_type="np").images


def convert(**options):
    return main([f"{key}={value}" for key, value in options.items()])


def test_a_pipeline_goes_to_our_layout_and_back(amused_pipeline, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert(input=amused_pipeline, output=ours) == 0
    transformer = load_transformer(ours, "transformer")
    shown = capsys.readouterr().out
    assert f"UVit2DModel -> MaskGiTUViT: {len(transformer.state_dict())} tensors" in shown
    assert "pipeline.json: grid=(4, 4), noise_schedule=linear" in shown
    assert transformer.mask_token_id == 23
    assert isinstance(load_vq_model(ours, "vae"), VQGANModel)

    assert convert(input=ours, output=back, to="amused") == 0
    wanted, found = pictures_of(amused_pipeline), pictures_of(back)
    assert wanted.shape == (2, 8, 8, 3) and np.ptp(wanted[0] - wanted[1]) > 0.1
    np.testing.assert_array_equal(found, wanted)
    small = convert(input=ours, output=tmp_path / "small", resolution=6)
    assert small == 0 and pictures_of(tmp_path / "small").shape == (2, 6, 6, 3)


def test_muse_pipeline_reads_and_writes_what_is_converted(amused_pipeline, tmp_path):
    def draw(folder):
        pipe = MusePipeline.from_pretrained(folder, device="cpu")
        generator = torch.Generator().manual_seed(5)
        return pipe, pipe(["a red cat", "the sea"], generator=generator, output_type="np")

    assert convert(input=amused_pipeline, output=tmp_path / "ours") == 0
    pipe, wanted = draw(amused_pipeline)
    np.testing.assert_array_equal(draw(tmp_path / "ours")[1], wanted)
    pipe.save_pretrained(tmp_path / "saved")
    assert convert(input=tmp_path / "saved", output=tmp_path / "back") == 0
    np.testing.assert_array_equal(pictures_of(tmp_path / "back"), pictures_of(amused_pipeline))


def test_a_pipeline_that_amused_cannot_decode_is_refused(tmp_path, capsys):
    VQGANModel(**SMALL_VQ | {"quantized_embed_dim": 6}).save_pretrained(tmp_path / "vae")
    our_uvit().save_pretrained(tmp_path / "transformer")
    (tmp_path / "text_encoder").mkdir()
    config = {"architectures": ["CLIPTextModelWithProjection"]}
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(config))
    assert convert(input=tmp_path, output=tmp_path / "out") == 2
    assert "z_channels=4 and quantized_embed_dim=6" in capsys.readouterr().err


def test_half_precision_weights_are_found(amused_pipeline, tmp_path):
    """Some repositories have them only, in files with .fp16. in their names."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.AmusedPipeline.from_pretrained(amused_pipeline).to(torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert convert(input=tmp_path / "half", output=tmp_path / "ours") == 0
    assert (tmp_path / "ours" / "text_encoder" / "model.safetensors").is_file()
    half = pipeline.transformer.state_dict()
    found = state_to_amused(load_transformer(tmp_path / "ours" / "transformer").state_dict())
    assert same_state(found, {name: tensor.float() for name, tensor in half.items()})


def test_single_models_go_both_ways(tmp_path, capsys):
    uvit, vq = our_uvit(), randomize(VQGANModel(num_embeddings=20, **SMALL_VQ))
    for name, model, load in (("uvit", uvit, load_transformer), ("vq", vq, load_vq_model)):
        model.save_pretrained(tmp_path / name)
        assert convert(input=tmp_path / name, output=tmp_path / f"{name} theirs") == 0
        assert convert(input=tmp_path / f"{name} theirs", output=tmp_path / f"{name} back") == 0
        back = load(tmp_path / f"{name} back")
        assert same_state(back.state_dict(), model.state_dict())
    assert "MaskGiTUViT_v2 -> UVit2DModel for 16x16 codes" in capsys.readouterr().out


def test_a_taming_checkpoint_becomes_a_model_directory(tmp_path, capsys):
    vq = randomize(VQGANModel(symmetric_pixels=True, **SMALL_VQ))
    state = vq.state_dict() | {"loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": state, "global_step": 5}, tmp_path / "last.ckpt")
    assert convert(input=tmp_path / "last.ckpt", output=tmp_path / "vq") == 0
    assert same_state(load_vq_model(tmp_path / "vq").state_dict(), vq.state_dict())
    shown = capsys.readouterr().out
    assert "left out: 1 tensors for training only: loss.logvar" in shown
    assert "left out: global_step (beside the weights)" in shown


def test_a_jax_checkpoint_is_told_from_a_torch_one(tmp_path, capsys):
    msgpack = pytest.importorskip("msgpack")
    (tmp_path / "file").write_bytes(msgpack.packb({"params": {"layer": {}}}))
    assert convert(input=tmp_path / "file", output=tmp_path / "out") == 2
    assert "is no MaskGIT tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "uvit", "output": "full"}, "is there already: choose a new or empty folder"),
        ({"input": "uvit", "output": "uvit/config.json"}, "is there already"),
        ({"input": "uvit", "to": "open_muse"}, "is our model: it can become amused, not open_muse"),
        ({"input": "uvit", "to": "taming"}, "to: "),
        ({"input": "theirs", "resolution": 8}, "resolution=8 has no place in our models"),
        ({"input": "full"}, "it holds: something"),
        ({"input": "maskgit vq"}, "holds a MaskGitVQGAN; aMUSEd has a layout for MaskGiTUViT"),
        ({"input": "pipeline"}, "aMUSEd's a CLIPTextModelWithProjection"),
        ({"input": "nobody/nothing"}, "nobody/nothing is neither a folder nor a hub repository"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_name_the_reason_and_leave_nothing(
    tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    our_uvit().save_pretrained(tmp_path / "uvit")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    save_amused_transformer(our_uvit(), tmp_path / "theirs")
    maskgit_vq = {key: value for key, value in SMALL_VQ.items() if key != "attn_resolutions"}
    MaskGitVQGAN(**maskgit_vq).save_pretrained(tmp_path / "maskgit vq")
    our_uvit().save_pretrained(tmp_path / "pipeline" / "transformer")
    MaskGitVQGAN(**maskgit_vq).save_pretrained(tmp_path / "pipeline" / "vae")
    before = sorted(tmp_path.rglob("*"))
    try:
        status = convert(**{"output": "out"} | options)
    except SystemExit as stopped:  # an illegal option
        status = stopped.code
    assert status == 2 and message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "muse-convert input=" in shown and "taming-transformers" in shown
    assert "resolution=None" in shown
