"""Weights that make up for the errors of their own rounding: where on-grid training begins.

GPTQ (arXiv 2210.17323) rounds one input of a layer after the other, and lets the inputs that are still to come take up each
error, as far as the layer's inputs on the user's rows tie them. What an input's weights have become when their turn comes is
kept here beside the code that they get: `quantize` gives these codes and scales for it, and an adapter moves it on from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgelora.quant.gptq import CHUNK_ROWS, round_inputs

FACTORS = (1.0, 0.97, 0.94, 0.9, 0.86, 0.8)  # scales tried, in units of a block's signed extreme / -2^(bits-1)
INSIDE = 0.46  # of a step: how far a weight may be from its code, so that storing it in 8 bits leaves it there


@torch.no_grad()
def compensated(weight_NK: Tensor, factor_KK: Tensor, bits: int, block_size: int) -> Tensor:
    """Return fp32 `[N, K]`, which `quantize` rounds to what GPTQ makes of a weight `[N, K]`.

    factor_KK: `inverse_factor` of the damped Hessian (quant/gptq.py). Each block's extreme is on the grid exactly, so that the
    block's scale follows from it.
    """
    found = torch.empty(weight_NK.shape)
    for start in range(0, weight_NK.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        weight_KN = weight_NK[rows].t().float().clone()
        rounder = _Kept(torch.empty_like(weight_KN), bits)
        round_inputs(weight_KN, factor_KK, block_size, rounder)
        found[rows] = rounder.found_KN.t()
    return found


class _Kept:
    """A Rounder that keeps the weights as they were when their turn came, as far as they round to the same code."""

    def __init__(self, found_KN: Tensor, bits: int) -> None:
        self.found_KN, self.bits, self.half, self.start = found_KN, bits, 2 ** (bits - 1), 0

    def begin(self, start: int, block_BN: Tensor, importance_B: Tensor) -> None:
        self.start = start
        self.scales_N, self.extreme_N = choose(block_BN, importance_B, self.bits)
        self.reach_N = self.scales_N.abs() * INSIDE

    def round(self, i: int, wanted_N: Tensor) -> Tensor:
        codes_N = torch.div(wanted_N, self.scales_N).round_().clamp_(-self.half, self.half - 1)
        codes_N.masked_fill_(self.extreme_N == i - self.start, -self.half)
        rounded_N = codes_N * self.scales_N
        off_N = torch.minimum(torch.maximum(wanted_N - rounded_N, -self.reach_N), self.reach_N)
        self.found_KN[i] = rounded_N + off_N.masked_fill_(codes_N == -self.half, 0.0)
        return rounded_N


def choose(block_BN: Tensor, importance_B: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the scales `[N]` of least weighted squared error, and which input of a block is its extreme, -1 for all zeros."""
    half = 2 ** (bits - 1)
    largest_N, extreme_N = block_BN.abs().max(0)
    signed_N = block_BN.gather(0, extreme_N.unsqueeze(0)).squeeze(0)
    extreme_N = extreme_N.masked_fill(largest_N == 0, -1)
    best_N, least_N = torch.ones_like(signed_N), torch.full_like(signed_N, torch.inf)
    for factor in FACTORS:
        scales_N = (signed_N * (factor / -half)).bfloat16().float()
        scales_N.masked_fill_(scales_N == 0, 1.0)
        error_BN = torch.div(block_BN, scales_N).round_().clamp_(-half, half - 1).mul_(scales_N).sub_(block_BN).square_()
        error_N = importance_B @ error_BN
        best_N = torch.where(error_N < least_N, scales_N, best_N)
        least_N = torch.minimum(error_N, least_N)
    return best_N, extreme_N
