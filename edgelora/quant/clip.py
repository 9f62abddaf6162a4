"""Block scales of least error: a search over how much of each block is clipped.

The error of a weight counts as much as its input is large: h = E[x²], the diagonal of the Hessian that `quant/gptq.py` uses
whole. Without inputs every weight counts the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgelora.quant.grid import QuantizedTensor, encode, to_blocks

CHUNK_ELEMENTS = 1 << 18  # weights searched at once: what they need stays in the processor's cache
# Scales tried, in units of the block's signed extreme / -2^(bits-1). A positive one hits the extreme with the code that the
# other side does not have; a negative one gives that code to the other side.
FACTORS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, -1.15, -1.07, -1.0, -0.94, -0.88, -0.82, -0.76)
FINE_FACTORS = (1.0,)  # of 8 bits: clipping gains nothing where a step is 1/128 of the extreme


def clipped_scales(weight_NK: Tensor, bits: int, block_size: int, importance_K: Tensor | None = None) -> Tensor:
    """Return scales fp32 `[N, ceil(K / block_size)]` that bf16 can represent, of least squared error; a block of zeros gets 1.

    importance_K: what the squared error of each input's weight counts; None: the same for all.
    """
    num_outputs, num_inputs = weight_NK.shape
    scales = torch.empty(num_outputs, -(-num_inputs // block_size))
    weights = torch.ones(1, num_inputs) if importance_K is None else importance_K.float().unsqueeze(0)
    importance_B = to_blocks(weights, block_size)
    step = max(1, CHUNK_ELEMENTS // max(num_inputs, 1))
    for start in range(0, num_outputs, step):
        blocks = to_blocks(weight_NK[start : start + step].float(), block_size)
        scales[start : start + step] = best_scales(blocks, bits, importance_B)
    return scales


def best_scales(blocks: Tensor, bits: int, importance: Tensor) -> Tensor:
    """Return the scales `[…]` for blocks `[…, block_size]`; `importance` has a shape that broadcasts with theirs."""
    low, high = blocks.amin(-1), blocks.amax(-1)
    unit = torch.where(high > -low, high, low) / -(2 ** (bits - 1))
    unit = torch.where(unit == 0, torch.ones_like(unit), unit)
    best, least = unit.bfloat16().float(), torch.full_like(unit, torch.inf)
    for factor in FACTORS if bits < 8 else FINE_FACTORS:
        scales = (unit * factor).bfloat16().float()
        codes, error = rounded(blocks, scales, bits, importance)
        if bits < 8:  # the scale of least error for these codes, by linear regression
            weighted = codes * importance
            fitted = ((weighted * blocks).sum(-1) / (weighted * codes).sum(-1).clamp_(min=1e-30)).bfloat16().float()
            fitted = torch.where(fitted == 0, scales, fitted)
            fitted_error = rounded(blocks, fitted, bits, importance)[1]
            scales, error = torch.where(fitted_error < error, fitted, scales), torch.minimum(fitted_error, error)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def rounded(blocks: Tensor, scales: Tensor, bits: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes without zero point `[…, block_size]`, as fp32, and the weighted squared error `[…]`."""
    half = 2 ** (bits - 1)
    wide = scales.unsqueeze(-1)
    codes = (blocks / wide).round_().clamp_(-half, half - 1)
    error = (codes * wide).sub_(blocks).square_().mul_(importance).sum(-1)
    return codes, error


def round_clipped(weight_NK: Tensor, bits: int, block_size: int, importance_K: Tensor | None = None) -> QuantizedTensor:
    """Round a weight `[N, K]` to nearest with the scales of least error."""
    step = max(1, CHUNK_ELEMENTS * 8 // max(weight_NK.shape[1], 1))
    scales = clipped_scales(weight_NK, bits, block_size, importance_K)
    parts = [
        encode(weight_NK[start : start + step], scales[start : start + step], bits, block_size).codes
        for start in range(0, weight_NK.shape[0], step)
    ]
    return QuantizedTensor(torch.cat(parts), scales, bits, block_size, weight_NK.shape[1])
