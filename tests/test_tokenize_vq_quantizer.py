"""The quantizer of every VQ model: the search of the nearest code, its loss, its gradients."""

import pytest
import torch

from tokenize_stage.vq.quantizer import VectorQuantizer, nearest_codes


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
