"""The nearest codes of a latent and their weights: what they are, what they depend on, stored."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from configs.load import ConfigError, load_config
from storage.cli import main as muse_store
from storage.reader import TokenStore
from storage.verify import verify_store
from tests.test_tokenize_vq import MODELS, small_vq
from tokenize_stage import encode
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.pipeline.encoder import Encoder
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.quantizer import SoftCodes, nearest_codes, soft_codes

CPU = torch.device("cpu")


def images(count, seed=0, side=16):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), np.uint8)


def made(encoder, pixels):
    return encoder.submit({pixels.shape[2]: pixels}).result()


@pytest.mark.parametrize("model_class", MODELS, ids=lambda model_class: model_class.__name__)
def test_they_are_the_largest_of_get_soft_code(model_class):
    vq, pixels = small_vq(model_class), torch.from_numpy(images(8)) / 255
    with torch.no_grad():
        probabilities, codes = vq.get_soft_code(pixels, temp=0.7)
    wanted, places = probabilities.topk(5)
    encoder = Encoder(
        {"codes_f2": vq},
        {"codes_f2": 16},
        CPU,
        torch.float32,
        8,
        soft={"codes_f2": SoftCodes(5, 0.7)},
    )
    columns = made(encoder, images(8))
    assert list(columns) == ["codes_f2", "topk_codes_f2", "topk_weights_f2"]
    ids, weights = columns["topk_codes_f2"], columns["topk_weights_f2"]
    assert ids.shape == weights.shape == (8, 64, 5)
    assert (ids.dtype, weights.dtype) == (np.uint16, np.float16)
    assert np.array_equal(columns["codes_f2"], codes) and np.array_equal(ids[..., 0], codes)
    assert np.array_equal(ids, places)
    shares = (wanted / wanted.sum(-1, keepdim=True)).numpy()
    np.testing.assert_allclose(weights, shares, atol=1e-3)
    np.testing.assert_allclose(weights.astype(np.float32).sum(-1), 1, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_depend_on_the_image_alone(dtype):
    pixels, options = images(9), {"soft": {"codes": SoftCodes(4, 0.5)}}
    models = ({"codes": small_vq(MaskGitVQGAN)}, {"codes": 16}, CPU, dtype)
    encoder = Encoder(*models, 9, **options)
    everything = made(encoder, pixels)
    for count in range(1, 10):
        some = np.random.default_rng(count).permutation(9)[:count]
        for column, values in made(encoder, pixels[some]).items():
            assert np.array_equal(values, everything[column][some])
    compiled = {"codes": small_vq(MaskGitVQGAN)}, *models[1:], 9, True, "eager"
    for column, values in made(Encoder(*compiled, **options), pixels[:2]).items():
        assert np.array_equal(values, everything[column][:2])
    plain = Encoder({"codes": small_vq(MaskGitVQGAN)}, *models[1:], 4)
    assert np.array_equal(made(plain, pixels[:4])["codes"], everything["codes"][:4])


def test_the_code_is_first_also_among_equals_and_chunks_do_not_show(monkeypatch):
    torch.manual_seed(0)
    half = torch.randn(6, 8)
    codebook, vectors = torch.cat([half, half]), torch.randn(50, 8)
    ids, weights = soft_codes(vectors, codebook, SoftCodes(4, 1.0))
    assert torch.equal(ids[:, 0], nearest_codes(vectors, codebook))
    assert (ids.sort(1).values.diff() > 0).all()  # no code twice
    torch.testing.assert_close(weights[:, 0], weights[:, 1])
    monkeypatch.setattr("tokenize_stage.vq.quantizer._CPU_DISTANCES", 12 * 7)  # seven rows each
    again = soft_codes(vectors, codebook, SoftCodes(4, 1.0))
    assert torch.equal(again[0][:, 0], ids[:, 0]) and torch.equal(again[1], weights)


def test_temperature_sharpens_and_one_code_has_all_the_weight():
    vectors, codebook = torch.randn(20, 4), torch.randn(30, 4)
    sharp, flat = (soft_codes(vectors, codebook, SoftCodes(6, t))[1] for t in (0.01, 1e6))
    assert sharp[:, 0].mean() > 0.9 and torch.allclose(flat, torch.full_like(flat, 1 / 6))
    assert (soft_codes(vectors, codebook, SoftCodes(1, 1.0))[1] == 1).all()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "vq"
    small_vq(MaskGitVQGAN).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Two tars of six images."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for seed in range(6 * number, 6 * number + 6):
                buffer = io.BytesIO()
                Image.fromarray(images(1, seed, 24)[0].transpose(1, 2, 0)).save(buffer, "PNG")
                info = tarfile.TarInfo(f"{seed:03}.png")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return folder


def tokenize(tars, store, *more):
    return encode.main(
        [
            f"dataset.shards_path_or_url={tars}", f"store.path={store}", "task=0", "tasks=1",
            "dataset.preprocessing.resolution=16", "encode.device=cpu", *more,
        ]
    )  # fmt: skip


COLUMNS = ["codes", "topk_codes", "topk_weights"]


@pytest.mark.parametrize("backend", ["zarr", "arrow"])
def test_a_store_keeps_them_and_reshapes_them(tokenizer, tars, tmp_path, backend):
    model = f"model.vq_model.pretrained={tokenizer}"
    soft = ["model.vq_model.topk=3", "model.vq_model.topk_temperature=0.5"]
    options = [model, *soft, f"store.backend={backend}"]
    assert tokenize(tars, tmp_path / "a", *options) == 0
    assert tokenize(tars / "1.tar", tmp_path / "b", *options) == 0
    store = TokenStore(tmp_path / "a")
    assert store.meta.transform["soft_codes"] == {"codes": {"topk": 3, "temperature": 0.5}}
    assert [*store.meta.arrays] == COLUMNS
    whole = {column: store.read_codes(slice(None), column) for column in COLUMNS}
    assert whole["topk_codes"].shape == whole["topk_weights"].shape == (12, 64, 3)
    assert np.array_equal(whole["topk_codes"][..., 0], whole["codes"])
    assert np.ptp(whole["topk_weights"][..., 0]) > 0.1

    other = {"zarr": "arrow", "arrow": "zarr"}[backend]
    assert (
        muse_store(["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--backend", other]) == 0
    )
    assert muse_store(["merge", *(str(tmp_path / name) for name in "mab"), "--prefix"]) == 0
    for folder, rows in (("c", [*range(12)]), ("m", [*range(12), *range(6, 12)])):
        assert not verify_store(tmp_path / folder)
        for column, values in whole.items():
            found = TokenStore(tmp_path / folder).read_codes(slice(None), column)
            assert np.array_equal(found, values[rows])


def test_tokenizers_of_one_pass_choose_for_themselves(tokenizer, tars, tmp_path):
    models = [f"model.vq_models.{name}.pretrained={tokenizer}" for name in ("a", "b", "c")]
    soft = ["model.vq_models.a.topk=2", "model.vq_models.c.topk=4"]
    assert tokenize(tars, tmp_path / "store", *models, *soft) == 0
    store = TokenStore(tmp_path / "store")
    assert {name: array.shape for name, array in store.meta.arrays.items()} == {
        "codes_a": [64], "topk_codes_a": [64, 2], "topk_weights_a": [64, 2],
        "codes_b": [64],
        "codes_c": [64], "topk_codes_c": [64, 4], "topk_weights_c": [64, 4],
    }  # fmt: skip
    assert list(store.meta.transform["soft_codes"]) == ["codes_a", "codes_c"]
    four = store.read_codes(slice(None), "topk_codes_c")
    assert np.array_equal(store.read_codes(slice(None), "topk_codes_a"), four[..., :2])


def test_without_them_a_store_is_as_ever_and_another_kind(tokenizer, tars, tmp_path, capsys):
    model = f"model.vq_model.pretrained={tokenizer}"
    assert tokenize(tars, tmp_path / "store", model) == 0
    meta = TokenStore(tmp_path / "store").meta
    assert [*meta.arrays] == ["codes"] and "soft_codes" not in meta.transform
    assert tokenize(tars, tmp_path / "store", model, "model.vq_model.topk=3") == 2
    assert "topk_codes" in capsys.readouterr().err


def test_options_that_cannot_be_are_refused(tokenizer, tars, tmp_path, capsys):
    zero, cold = "model.vq_model.topk=0", "model.vq_models.a.topk_temperature=0"
    for given, message in (
        ([zero], "model.vq_model.topk=0: legal are 1 or more"),
        ([cold, "model.vq_models.a.pretrained=z"], "a.topk_temperature=0.0: must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(TokenizeConfig, ["dataset.shards_path_or_url=x", "store.path=y", *given])
    options = f"model.vq_model.pretrained={tokenizer}", "model.vq_model.topk=33"
    assert tokenize(tars, tmp_path / "store", *options) == 2
    assert "topk=33" in (text := capsys.readouterr().err) and "has 32 codes" in text
