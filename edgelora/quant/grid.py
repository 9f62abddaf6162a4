"""The one quantization grid: the format of ONNX Runtime's MatMulNBits, from training to the device.

A weight `[N, K]` (N outputs, K inputs) is cut into blocks of `block_size` along K, and `w = (q - zero_point) * scale`
with the implied zero point `2 ** (bits - 1)`. Codes are packed into uint8 `[N, ceil(K / block), block * bits / 8]`, low
nibble first; scales are fp32 `[N, ceil(K / block)]` that bf16 can represent, so that kernels which keep bf16 scales
see the same weights. Source: the operator specification of com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDED_AT_ONCE = 1 << 20  # weights


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight on the grid.

    codes:  uint8 `[N, ceil(K / block_size), block_size * bits // 8]`
    scales: fp32 `[N, ceil(K / block_size)]`, bf16-representable; may be negative
    """

    codes: Tensor
    scales: Tensor
    bits: int
    block_size: int
    num_inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.num_inputs

    @property
    def num_bytes(self) -> int:
        return self.codes.numel() + 4 * self.scales.numel()


def quantize(weight_NK: Tensor, bits: int, block_size: int, into: QuantizedTensor | None = None) -> QuantizedTensor:
    """Round a weight `[N, K]` to nearest on the grid, in the memory of `into` if given. The only rounding in EdgeLoRA.

    The scale of a block is its signed extreme / -2^(bits-1): the value of largest magnitude is hit exactly, and the
    one code more that the negative side has is always used, so a scale may be negative.
    """
    num_outputs, num_inputs = weight_NK.shape
    found = unwritten(num_outputs, num_inputs, bits, block_size) if into is None else into
    codes, scales = found.codes, found.scales
    # Some rows at a time: the temporaries stay small beside an embedding of 49,152 rows.
    step = max(1, ROUNDED_AT_ONCE // max(num_inputs, 1))
    for start in range(0, num_outputs, step):
        part = weight_NK[start : start + step]
        scales[start : start + step] = choose_scales(part, bits, block_size)
        codes[start : start + step] = encode(part, scales[start : start + step], bits, block_size).codes
    return found


def unwritten(num_outputs: int, num_inputs: int, bits: int, block_size: int) -> QuantizedTensor:
    """Return the memory of a weight on the grid."""
    num_blocks = -(-num_inputs // block_size)
    codes = torch.empty(num_outputs, num_blocks, block_size * bits // 8, dtype=torch.uint8)
    return QuantizedTensor(codes, torch.empty(num_outputs, num_blocks), bits, block_size, num_inputs)


def choose_scales(weight_NK: Tensor, bits: int, block_size: int) -> Tensor:
    """Return the scales fp32 `[N, ceil(K / block_size)]` for a weight `[N, K]`; a block of zeros gets 1."""
    blocks = to_blocks(weight_NK.float(), block_size)
    low, high = blocks.amin(-1), blocks.amax(-1)  # each a tenth of aminmax's time, and of argmax's
    extreme = torch.where(high > -low, high, low)
    scales = extreme.div_(-(2 ** (bits - 1))).bfloat16().float()
    return scales.masked_fill_(scales == 0, 1.0)


def encode(weight_NK: Tensor, scales: Tensor, bits: int, block_size: int) -> QuantizedTensor:
    """Return the nearest codes of a weight `[N, K]` for given scales `[N, ceil(K / block_size)]`."""
    blocks = to_blocks(weight_NK.float(), block_size)
    zero_point = 2 ** (bits - 1)
    # To int8 first: that is a fifth of the time that torch takes from fp32 to uint8.
    signed = (blocks / scales.unsqueeze(-1)).round_().clamp_(-zero_point, zero_point - 1).to(torch.int8)
    codes = signed.bitwise_xor_(-128) if bits == 8 else signed.add_(zero_point)
    return QuantizedTensor(pack(codes.view(torch.uint8), bits), scales, bits, block_size, weight_NK.shape[1])


def dequantize(tensor: QuantizedTensor, out: Tensor | None = None) -> Tensor:
    """Return fp32 `[N, K]`; `out`, of at least N * ceil(K / block) * block elements, is reused as the memory.

    `out` may be bf16: codes and scales are exact there, their product is rounded once.
    """
    num_outputs, num_blocks = tensor.scales.shape
    if out is None:
        out = torch.empty(num_outputs * num_blocks * tensor.block_size)
    size = num_outputs, num_blocks, tensor.block_size
    blocks = out.view(-1)[: num_outputs * num_blocks * tensor.block_size].view(size)
    blocks.copy_(signed_codes(tensor.codes, tensor.bits)).mul_(tensor.scales.to(out.dtype).unsqueeze(-1))
    return blocks.view(num_outputs, num_blocks * tensor.block_size)[:, : tensor.num_inputs]


_bytes = torch.empty(0, dtype=torch.int8)


def signed_codes(codes: Tensor, bits: int) -> Tensor:
    """Return packed codes minus the zero point, int8 `[N, blocks, block_size]`, in a buffer that lives until the next call.

    As long as numbers are bytes, a pass over them costs a quarter of one in fp32, so all but the scaling is done there.
    """
    global _bytes
    size = {4: 4, 8: 1}.get(bits, 0) * codes.numel()
    if _bytes.numel() < size:
        with torch.inference_mode(False):  # a merge may come first: what is made in inference mode, training may not write
            _bytes = torch.empty(size, dtype=torch.int8)
    if bits == 4:
        # A byte 0xHL becomes the 16-bit number 0x0H0L, in memory the bytes L, H: the codes in their order.
        pairs, moved = (half.view(torch.int16).view(codes.shape) for half in _bytes[:size].chunk(2))
        torch.bitwise_left_shift(pairs.copy_(codes), 4, out=moved)
        return pairs.bitwise_or_(moved).bitwise_and_(0x0F0F).view(torch.int8).sub_(8)
    if bits == 8:
        return torch.bitwise_xor(codes.view(torch.int8), -128, out=_bytes[:size].view(codes.shape))
    return unpack(codes, bits).view(torch.int8).sub_(2 ** (bits - 1))


def to_blocks(weight_NK: Tensor, block_size: int) -> Tensor:
    """Return a view or zero-padded copy `[N, ceil(K / block_size), block_size]`."""
    padding = -weight_NK.shape[1] % block_size
    if padding:
        weight_NK = torch.nn.functional.pad(weight_NK, (0, padding))
    return weight_NK.reshape(weight_NK.shape[0], -1, block_size)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `[..., block]` into `[..., block * bits // 8]`, first code in the low bits."""
    per_byte = 8 // bits
    if bits == 4 and codes.is_contiguous():
        pairs = codes.view(torch.int16)  # the 16-bit number 0x0H0L, whose low byte becomes 0xHL
        return torch.bitwise_right_shift(pairs, 4).bitwise_or_(pairs).to(torch.uint8)
    groups = codes.view(*codes.shape[:-1], -1, per_byte)
    packed = groups[..., 0].clone()
    for position in range(1, per_byte):
        packed |= groups[..., position] << (bits * position)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`: uint8 `[..., block * bits // 8]` to `[..., block]`."""
    per_byte = 8 // bits
    parts = [(packed >> (bits * position)) & (2**bits - 1) for position in range(per_byte)]
    return torch.stack(parts, -1).view(*packed.shape[:-1], -1)


def round_to_int8(x: Tensor, block_size: int) -> Tensor:
    """Return x `[…, K]` rounded to int8 with one scale, max / 127, per block. Source: MLAS, the CompInt8 kernels' QuantizeARow.

    On AVX2 and AVX-512 a MatMulNBits of 4 or 8 bits equals the product with this to 3e-7 of its output.
    """
    blocks = to_blocks(x.reshape(-1, x.shape[-1]), block_size)
    scales = torch.linalg.vector_norm(blocks, torch.inf, -1, keepdim=True).div_(127)
    codes = torch.div(blocks, scales.masked_fill(scales == 0, 1.0)).round_()
    return codes.mul_(scales).view(codes.shape[0], -1)[:, : x.shape[-1]].reshape(x.shape)
