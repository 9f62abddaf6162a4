"""GPTQ and the clipping search: against the paper's algorithm written plainly, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgelora.errors import ModelError
from edgelora.quant.calibrate import Moments
from edgelora.quant.clip import round_clipped
from edgelora.quant.gptq import DAMPING, gptq, hessian_error, inverse_factor
from edgelora.quant.grid import QuantizedTensor, choose_scales, dequantize, quantize, unpack


def a_layer(num_outputs: int, num_inputs: int, tokens: int = 2000) -> tuple[Tensor, Tensor]:
    """Return a weight [N, K] and the mean Hessian of inputs that hang together and differ in size."""
    torch.manual_seed(0)
    x = torch.randn(tokens, num_inputs) @ (torch.randn(num_inputs, num_inputs) / num_inputs**0.5 + 0.3 * torch.eye(num_inputs))
    x *= torch.linspace(0.2, 3.0, num_inputs)
    return torch.randn(num_outputs, num_inputs) * 0.05, x.t() @ x / tokens


def plain_gptq(weight_NK: Tensor, hessian_KK: Tensor, bits: int, block_size: int) -> Tensor:
    """Return the codes of the paper's algorithm 1 in double precision, one input after the other, H⁻¹ shrunk by elimination."""
    weight, hessian = weight_NK.double().clone(), hessian_KK.double().clone()
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    half = 2 ** (bits - 1)
    for i in range(weight.shape[1]):
        if i % block_size == 0:
            scales = choose_scales(weight[:, i : i + block_size].float(), bits, block_size)[:, 0].double()
        codes[:, i] = (weight[:, i] / scales).round().clamp(-half, half - 1).long() + half
        error = (weight[:, i] - (codes[:, i] - half) * scales) / inverse[i, i]
        weight -= error.unsqueeze(1) * inverse[i].unsqueeze(0)
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    return codes


@pytest.mark.parametrize(("num_inputs", "block_size"), [(160, 32), (192, 64), (256, 256)])
def test_it_is_the_papers_algorithm(num_inputs: int, block_size: int) -> None:
    weight, hessian = a_layer(8, num_inputs)
    found, _ = gptq(weight, inverse_factor(hessian), 4, block_size, search=False)
    codes = unpack(found.codes, 4).flatten(1)[:, :num_inputs].long()
    assert torch.equal(codes, plain_gptq(weight, hessian, 4, block_size))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", [32, 64])
def test_it_loses_less_than_rounding_to_nearest(bits: int, block_size: int) -> None:
    weight, hessian = a_layer(40, 224)
    factor = inverse_factor(hessian)

    def error(tensor: QuantizedTensor) -> float:
        return hessian_error(dequantize(tensor) - weight, hessian)

    nearest = error(quantize(weight, bits, block_size))
    clipped = error(round_clipped(weight, bits, block_size, hessian.diagonal()))
    plain, searched = (error(gptq(weight, factor, bits, block_size, search=search)[0]) for search in (False, True))
    assert plain < 0.85 * nearest
    assert searched <= plain * (1.0 if bits == 8 else 0.97)
    assert clipped <= nearest
    assert searched < clipped


def test_the_error_that_it_tells_is_that_of_the_damped_hessian() -> None:
    weight, hessian = a_layer(16, 96)
    found, error = gptq(weight, inverse_factor(hessian), 4, 32)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(96)
    assert error == pytest.approx(hessian_error(dequantize(found) - weight, damped), rel=1e-3)


@pytest.mark.parametrize(("bits", "block_size"), [(2, 32), (4, 32), (4, 128), (8, 64)])
def test_codes_and_scales_are_legal_where_blocks_are_not_full(bits: int, block_size: int) -> None:
    weight, hessian = a_layer(6, 72)
    for found in (gptq(weight, inverse_factor(hessian), bits, block_size)[0], round_clipped(weight, bits, block_size)):
        blocks = -(-72 // block_size)
        assert found.codes.shape == (6, blocks, block_size * bits // 8)
        assert found.codes.dtype == torch.uint8
        assert torch.equal(found.scales, found.scales.bfloat16().float())
        assert bool((found.scales != 0).all())
        assert dequantize(found).shape == weight.shape
        assert (dequantize(found) - weight).norm() < (1.0 if bits == 2 else 0.25) * weight.norm()


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, hessian = a_layer(6, 64)
    hessian[:, 5] = hessian[5] = 0
    found, _ = gptq(weight, inverse_factor(hessian), 4, 32)
    assert bool(torch.isfinite(dequantize(found)).all())
    zero = gptq(torch.zeros(4, 64), inverse_factor(torch.zeros(64, 64)), 4, 32)[0]
    assert dequantize(zero).abs().max() == 0


def test_inputs_that_are_not_finite_are_refused() -> None:
    hessian = torch.eye(32)
    hessian[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        inverse_factor(hessian)


def test_clipping_finds_the_scale_of_a_block_with_one_outlier() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 32) * 0.1
    weight[:, 0] = 1.0
    importance = torch.ones(32)
    importance[0] = 1e-6
    near, clipped = (t for t in (quantize(weight, 4, 32), round_clipped(weight, 4, 32, importance)))
    assert (dequantize(clipped) - weight)[:, 1:].norm() < 0.8 * (dequantize(near) - weight)[:, 1:].norm()


def test_moments_are_those_of_all_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    flat = x.reshape(-1, 8)
    whole = Moments(8)
    whole.add(x[:1])
    whole.add(x[1:])
    torch.testing.assert_close(whole.sums, flat.t() @ flat)
    change = torch.randn(3, 8)
    torch.testing.assert_close(whole.output_error(change), (flat @ change.t()).square().mean(0))
    importance = whole.importance()
    monkeypatch.setattr("edgelora.quant.calibrate.LARGEST_HESSIAN", 4)
    narrow = Moments(8)
    narrow.add(x)
    torch.testing.assert_close(narrow.sums, flat.square().sum(0))
    torch.testing.assert_close(narrow.importance(), importance)
