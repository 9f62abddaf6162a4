"""Weights that make up for the errors of their own rounding: where on-grid training begins.

GPTQ (arXiv 2210.17323) rounds one input of a layer after the other, and lets the inputs that are still to come take up each
error, as far as the layer's inputs on the user's rows tie them. What an input's weights have become when their turn comes is
kept here beside the code that they get: `quantize` gives these codes and scales for it, and an adapter moves it on from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTORS = (1.0, 0.97, 0.94, 0.9, 0.86, 0.8)  # scales tried, in units of a block's signed extreme / -2^(bits-1)
INSIDE = 0.46  # of a step: how far a weight may be from its code, so that storing it in 8 bits leaves it there
CHUNK_ROWS = 4096  # outputs at once: they do not depend on each other


@torch.no_grad()
def compensated(weight_NK: Tensor, factor_KK: Tensor, bits: int, block_size: int) -> Tensor:
    """Return fp32 `[N, K]`, which `quantize` rounds to what GPTQ makes of a weight `[N, K]`.

    factor_KK: `inverse_factor` of the damped Hessian (quant/gptq.py). Each block's extreme is on the grid exactly, so that the
    block's scale follows from it.
    """
    found = torch.empty(weight_NK.shape)
    for start in range(0, weight_NK.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        found[rows] = _compensated(weight_NK[rows].t().float().clone(), factor_KK, bits, block_size).t()
    return found


def _compensated(weight_KN: Tensor, factor_KK: Tensor, bits: int, block_size: int) -> Tensor:
    """The same of the transposed weight, which is overwritten."""
    num_inputs, half = weight_KN.shape[0], 2 ** (bits - 1)
    found_KN = torch.empty_like(weight_KN)
    for start in range(0, num_inputs, block_size):
        stop = min(start + block_size, num_inputs)
        block_BN, factor_BB = weight_KN[start:stop], factor_KK[start:stop, start:stop]
        # An error of input i costs (w - q)² / U_ii² once those after it have made up for it.
        scales_N, extreme_N = choose(block_BN, torch.diagonal(factor_BB).square().reciprocal(), bits)
        reach_N = scales_N.abs() * INSIDE
        errors_BN = torch.empty_like(block_BN)
        for i in range(stop - start):
            wanted_N = block_BN[i]
            codes_N = torch.div(wanted_N, scales_N).round_().clamp_(-half, half - 1)
            codes_N.masked_fill_(extreme_N == i, -half)
            rounded_N = codes_N * scales_N
            off_N = torch.minimum(torch.maximum(wanted_N - rounded_N, -reach_N), reach_N)
            found_KN[start + i] = rounded_N + off_N.masked_fill_(codes_N == -half, 0.0)
            torch.div(wanted_N - rounded_N, factor_BB[i, i], out=errors_BN[i])
            block_BN[i + 1 :].addr_(factor_BB[i, i + 1 :], errors_BN[i], alpha=-1)
        weight_KN[stop:].addmm_(factor_KK[start:stop, stop:].t(), errors_BN, alpha=-1)
    return found_KN


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
