"""The quantization grid: packing as MatMulNBits reads it, nearest codes, scales that bf16 can hold, exact round trips."""

from __future__ import annotations

import pytest
import torch

from edgelora.quant.grid import QuantizedTensor, choose_scales, dequantize, encode, pack, quantize, unpack


def by_hand(tensor: QuantizedTensor) -> list[list[float]]:
    """Unpack by the operator's specification, number by number."""
    per_byte, mask = 8 // tensor.bits, 2**tensor.bits - 1
    rows = []
    for codes, scales in zip(tensor.codes.tolist(), tensor.scales.tolist(), strict=True):
        row = []
        for block, scale in zip(codes, scales, strict=True):
            for byte in block:
                row += [((byte >> (tensor.bits * i) & mask) - 2 ** (tensor.bits - 1)) * scale for i in range(per_byte)]
        rows.append(row[: tensor.num_inputs])
    return rows


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("shape", "block_size"), [((5, 64), 32), ((3, 100), 32), ((7, 33), 16), ((1, 256), 128)])
def test_dequantize_follows_the_specification(bits: int, shape: tuple[int, int], block_size: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensor = quantize(weight, bits, block_size)
    blocks = -(-shape[1] // block_size)
    assert tensor.codes.shape == (shape[0], blocks, block_size * bits // 8)
    assert tensor.codes.dtype == torch.uint8
    assert tensor.scales.shape == (shape[0], blocks)
    assert torch.equal(dequantize(tensor), torch.tensor(by_hand(tensor)))


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_nearest(bits: int) -> None:
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    scales = choose_scales(weight, bits, 32)
    codes = unpack(encode(weight, scales, bits, 32).codes, bits).double()
    grid = torch.arange(2**bits).double() - 2 ** (bits - 1)
    values = grid.view(1, 1, 1, -1) * scales.double()[..., None, None]
    best = (values - weight.double().view(16, 3, 32, 1)).abs().amin(-1)
    chosen = ((codes - 2 ** (bits - 1)) * scales.double()[..., None] - weight.double().view(16, 3, 32)).abs()
    assert (chosen - best).max() < 1e-6


def test_scales_are_bf16_and_hit_the_extreme() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    tensor = quantize(weight, 4, 32)
    assert torch.equal(tensor.scales, tensor.scales.bfloat16().float())
    blocks, found = weight.view(8, 2, 32), dequantize(tensor).view(8, 2, 32)
    place = blocks.abs().argmax(-1, keepdim=True)
    # the extreme is code 0, off only by what bf16 rounds off the scale: 2^-9 of it
    assert torch.all((found.gather(-1, place) / blocks.gather(-1, place) - 1).abs() <= 2**-8)
    assert torch.all(unpack(tensor.codes, 4).gather(-1, place) == 0)


def test_what_is_on_the_grid_stays() -> None:
    tensor = quantize(torch.randn(8, 96, generator=torch.Generator().manual_seed(3)), 4, 32)
    again = encode(dequantize(tensor), tensor.scales, 4, 32)
    assert torch.equal(again.codes, tensor.codes)


def test_zero_and_constant_blocks() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 32:] = 3.0
    tensor = quantize(weight, 4, 32)
    assert torch.equal(dequantize(tensor), weight)
    assert torch.equal(tensor.scales, torch.tensor([[1.0, 1.0], [1.0, -0.375]]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_is_low_bits_first(bits: int) -> None:
    codes = torch.arange(32).remainder(2**bits).to(torch.uint8).view(1, 1, 32)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    if bits == 4:
        assert pack(codes, bits)[0, 0, :2].tolist() == [0x10, 0x32]


def test_rows_rounded_in_parts_equal_rows_rounded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 100, generator=torch.Generator().manual_seed(4))
    whole = quantize(weight, 4, 32)
    monkeypatch.setattr("edgelora.quant.grid.ROUNDED_AT_ONCE", 500)
    parts = quantize(weight, 4, 32)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


def test_the_buffer_is_reused() -> None:
    tensor = quantize(torch.randn(4, 40, generator=torch.Generator().manual_seed(5)), 8, 32)
    buffer = torch.full((4 * 64 + 10,), 7.0)
    out = dequantize(tensor, buffer)
    assert out.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert torch.equal(out, dequantize(tensor))
    assert torch.all(buffer[4 * 64 :] == 7.0)
