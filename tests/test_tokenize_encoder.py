"""The encoder: codes depend on an image's pixels alone, in every dtype and however batched."""

import resource
import sys

import numpy as np
import pytest
import torch

from tests.test_tokenize_vq import MODELS, small_vq
from tokenize_stage.pipeline.encoder import CPU_IMAGES, Encoder, keep_heap
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.quantizer import as_vectors
from tokenize_stage.vq.vqgan import VQGANModel

CPU = torch.device("cpu")
AMUSED = {
    "channel_mult": (1, 2, 2, 4, 6),
    "attn_resolutions": (),
    "no_attn_mid_block": True,
    "z_channels": 64,
    "quantized_embed_dim": 64,
    "num_embeddings": 8192,
}


def images(count, resolution=16, seed=0):
    """Noise of a contrast that differs from image to image."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, 3, resolution, resolution))
    contrast = rng.uniform(5, 80, size=(count, 1, 1, 1))
    return np.clip(128 + contrast * noise, 0, 255).astype(np.uint8)


def encoder_of(model, resolution=16, dtype=torch.float32, **options):
    options = {"device": CPU, "batch_size": 9, **options}
    return Encoder({"codes": model}, {"codes": resolution}, dtype=dtype, **options)


def codes_of(encoder, pixels):
    return encoder.submit({pixels.shape[2]: pixels}).result()["codes"]


def tight_codebook(model, resolution):
    """Vectors near latents of images, so that the smallest difference changes a code."""
    with torch.no_grad():
        pixels = torch.from_numpy(images(4, resolution, seed=1)) / 255
        vectors = as_vectors(model.latents(pixels))
        picked = torch.randint(len(vectors), (model.codebook_size,))
        noise = torch.randn(model.codebook_size, vectors.shape[1]) * vectors.std() / 4
        model.quantizer.vectors.data = vectors[picked] + noise
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_class", MODELS, ids=lambda model_class: model_class.__name__)
def test_codes_depend_on_the_image_alone(model_class, dtype):
    pixels = images(9)
    encoder = encoder_of(small_vq(model_class), dtype=dtype)
    codes = codes_of(encoder, pixels)
    assert codes.shape == (9, 64) and codes.dtype == np.uint16 and len(np.unique(codes)) > 5
    for count in range(1, 10):
        some = np.random.default_rng(count).permutation(9)[:count]
        assert np.array_equal(codes_of(encoder, pixels[some]), codes[some])
    one_by_one = encoder_of(small_vq(model_class), dtype=dtype, batch_size=1)
    alone = np.concatenate([codes_of(one_by_one, pixels[i : i + 1]) for i in range(9)])
    assert np.array_equal(alone, codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["maskgit f16", "amused f16"])
def test_codes_of_published_sizes_depend_on_the_image_alone(name, dtype):
    torch.manual_seed(0)
    model = MaskGitVQGAN() if name == "maskgit f16" else VQGANModel(**AMUSED)
    encoder = encoder_of(tight_codebook(model.eval(), 32), resolution=32, dtype=dtype)
    pixels = images(9, 32)
    codes = codes_of(encoder, pixels)
    assert len(np.unique(codes)) > 15
    order = np.random.default_rng(0).permutation(9)
    for some in (order, order[:1], order[2:7]):
        assert np.array_equal(codes_of(encoder, pixels[some]), codes[some])


def test_a_model_sees_one_shape_whatever_the_batch_size():
    """Since convolutions of other shapes round otherwise: the last image of an odd batch, say."""
    seen = set()
    model = small_vq(MaskGitVQGAN)
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape))
    for batch_size in (1, 5, 16):
        encoder = encoder_of(model, batch_size=batch_size)
        for count in range(1, batch_size + 1):
            codes_of(encoder, images(count))
    assert seen == {(CPU_IMAGES, 3, 16, 16)}
    assert [encoder.piece(side) for side in (64, 128, 256, 512)] == [8, 4, 1, 1]


def test_many_models_see_their_resolutions_in_one_pass():
    models = {f"codes_{i}": small_vq(model_class, i) for i, model_class in enumerate(MODELS)}
    resolutions = dict(zip(models, (16, 32, 16, 32), strict=True))
    pixels = {side: images(5, side) for side in (16, 32)}
    with torch.no_grad():
        expected = {
            column: models[column].encode(torch.from_numpy(pixels[side]) / 255)
            for column, side in resolutions.items()
        }
    encoder = Encoder(models, resolutions, CPU, torch.float32, batch_size=8)
    first, second = encoder.submit(pixels), encoder.submit(pixels)
    assert list(second.result()) == list(models)
    for column, codes in first.result().items():
        assert np.array_equal(codes, expected[column])
        assert np.array_equal(second.result()[column], codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_searches_float32_vectors_in_float32(dtype):
    model, pixels = small_vq(MaskGitVQGAN), images(4)
    codebook = model.quantizer.vectors.double()  # as they are before the model is converted
    encoder = encoder_of(model, dtype=dtype)
    assert model.encoder.conv_in.weight.dtype == dtype
    padded = np.zeros((encoder.piece(16), 3, 16, 16), np.uint8)
    padded[:4] = pixels
    with torch.inference_mode():
        batch = torch.from_numpy(padded) / 255
        latents = model.latents(batch.to(dtype, memory_format=torch.channels_last))
    distances = torch.cdist(as_vectors(latents).double(), codebook)
    assert np.array_equal(codes_of(encoder, pixels), distances.argmin(1).view(-1, 64)[:4])


def test_numbers_out_of_range_are_refused_with_the_way_out():
    model = small_vq(MaskGitVQGAN)
    model.encoder.conv_out.weight.data *= 1e6
    pending = encoder_of(model, dtype=torch.float16).submit({16: images(1)})
    with pytest.raises(ValueError, match=r"codes: .*float16.*encode.dtype=bfloat16 or float32"):
        pending.result()
    broken = small_vq(MaskGitVQGAN)
    broken.encoder.conv_out.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"codes: .*float32: the tokenizer's weights are broken"):
        codes_of(encoder_of(broken), images(1))


def test_a_model_is_compiled_once_whatever_the_batch():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = encoder_of(small_vq(MaskGitVQGAN), compile=True, backend=backend)
    plain = encoder_of(small_vq(MaskGitVQGAN))
    for count in (9, 1, 4):
        assert np.array_equal(codes_of(compiled, images(count)), codes_of(plain, images(count)))
    assert len(graphs) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has mallopt")
def test_freed_memory_is_kept():
    keep_heap()

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(64 * 2**20, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 1600  # of 16384 pages


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_gpu_gives_the_codes_of_a_cpu(dtype):
    gpu = encoder_of(small_vq(MaskGitVQGAN), device=torch.device("cuda"), dtype=dtype)
    pixels = images(9 * 8)
    expected = np.concatenate(
        [codes_of(encoder_of(small_vq(MaskGitVQGAN)), part) for part in np.split(pixels, 8)]
    )
    pending = [gpu.submit({16: part}) for part in np.split(pixels, 8)]  # more than are in flight
    codes = np.concatenate([one.result()["codes"] for one in pending])
    assert (codes == expected).mean() > (0.999 if dtype == torch.float32 else 0.9)
    again = np.concatenate([codes_of(gpu, pixels[i : i + 1]) for i in range(9)])
    assert np.array_equal(again, codes[:9])
