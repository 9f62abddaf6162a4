"""Rounding that makes up for its errors: GPTQ (arXiv 2210.17323) onto the grid of `quant/grid.py`.

Wanted are codes with a small ‖(W - Q) X‖², X the inputs of the layer on the user's rows: tr((W - Q) H (W - Q)ᵀ), H = XXᵀ.
Inputs are rounded one after the other; the error of each is taken up by the inputs still to come, as far as X ties them.

Scales are chosen block by block, when what earlier blocks have left is in the weights already, by the search of
`quant/clip.py`. Inputs keep their order: a permutation across blocks has no form in MatMulNBits (`g_idx` leaves its fast
kernels).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from edgelora.errors import ModelError
from edgelora.quant.clip import best_scales
from edgelora.quant.grid import QuantizedTensor, choose_scales, pack, to_blocks

DAMPING = 0.01  # share of the mean diagonal added to it, as in the paper
MOST_DAMPING = 1.0
COLUMNS = 128  # inputs rounded before the others hear of it (the paper's B)
CHUNK_ROWS = 4096  # outputs rounded at once: they do not depend on each other


def gptq(
    weight_NK: Tensor, factor_KK: Tensor, bits: int, block_size: int, *, search: bool = True
) -> tuple[QuantizedTensor, float]:
    """Return the weight `[N, K]` on the grid, and its error tr((W - Q) H (W - Q)ᵀ).

    factor_KK: `inverse_factor` of the damped Hessian. search: choose scales by clipping, else max / -2^(bits-1).
    """
    parts, error = [], 0.0
    for start in range(0, weight_NK.shape[0], CHUNK_ROWS):
        rows = weight_NK[start : start + CHUNK_ROWS]
        rounder = _ToGrid(rows.shape[1], rows.shape[0], bits, block_size, search)
        error += round_inputs(rows.t().float().contiguous(), factor_KK, block_size, rounder)
        codes = rounder.signed_KN.t().add(rounder.half).to(torch.uint8)
        parts.append((pack(to_blocks(codes, block_size), bits), torch.stack(rounder.scales, 1)))
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantizedTensor(codes, scales, bits, block_size, weight_NK.shape[1]), error


class Rounder(Protocol):
    """What becomes of a weight whose turn has come."""

    def begin(self, start: int, block_BN: Tensor, importance_B: Tensor) -> None:
        """See a block of inputs as earlier ones have left it. An error of input i costs (w - q)² / U_ii² once those after it
        have made up for it: `importance_B`."""
        ...

    def round(self, i: int, wanted_N: Tensor) -> Tensor:
        """Return what input i's weights `[N]` are rounded to."""
        ...


def round_inputs(weight_KN: Tensor, factor_KK: Tensor, block_size: int, rounder: Rounder) -> float:
    """Round one input after the other, those to come taking up each error; return the error. `weight_KN` is overwritten."""
    num_inputs, num_outputs = weight_KN.shape
    columns, error = max(COLUMNS, block_size), 0.0
    importance_K = torch.diagonal(factor_KK).square().reciprocal()
    for start in range(0, num_inputs, columns):
        stop = min(start + columns, num_inputs)
        errors = torch.empty(stop - start, num_outputs)
        for i in range(start, stop):
            if i % block_size == 0:
                rounder.begin(i, weight_KN[i : i + block_size], importance_K[i : i + block_size])
            row = factor_KK[i]
            torch.sub(weight_KN[i], rounder.round(i, weight_KN[i]), out=errors[i - start]).div_(row[i])
            if i + 1 < stop:
                weight_KN[i + 1 : stop].addr_(row[i + 1 : stop], errors[i - start], alpha=-1)
        if stop < num_inputs:
            weight_KN[stop:].addmm_(factor_KK[start:stop, stop:].t(), errors, alpha=-1)
        error += errors.square_().sum(dtype=torch.float64).item()
    return error


class _ToGrid:
    """A Rounder that keeps codes `[K, N]`, without zero point, and the scales `[N]` of each block."""

    def __init__(self, num_inputs: int, num_outputs: int, bits: int, block_size: int, search: bool) -> None:
        self.signed_KN = torch.zeros(-(-num_inputs // block_size) * block_size, num_outputs)
        self.scales: list[Tensor] = []
        self.bits, self.half, self.search = bits, 2 ** (bits - 1), search

    def begin(self, start: int, block_BN: Tensor, importance_B: Tensor) -> None:
        blocks_NB = block_BN.t().contiguous()
        if self.search:
            self.scales.append(best_scales(blocks_NB, self.bits, importance_B))
        else:
            self.scales.append(choose_scales(blocks_NB, self.bits, blocks_NB.shape[1])[:, 0])

    def round(self, i: int, wanted_N: Tensor) -> Tensor:
        torch.div(wanted_N, self.scales[-1], out=self.signed_KN[i]).round_().clamp_(-self.half, self.half - 1)
        return self.signed_KN[i] * self.scales[-1]


def inverse_factor(hessian_KK: Tensor, damping: float = DAMPING) -> Tensor:
    """Return U, upper triangular, with H⁻¹ = UᵀU for the damped H. An input that is always 0 gets the mean of the others.

    Raises ModelError for a Hessian that is not finite.
    """
    diagonal = torch.diagonal(hessian_KK)
    mean = diagonal.mean().item()
    if not torch.isfinite(hessian_KK).all():
        raise ModelError("a layer's inputs are not finite on these rows", hint="check the adapter: it may not have converged")
    while damping <= MOST_DAMPING:
        damped = hessian_KK.clone()
        added = torch.where(diagonal == 0, torch.full_like(diagonal, mean or 1.0), torch.full_like(diagonal, damping * mean))
        torch.diagonal(damped).add_(added)
        # H = R Rᵀ with R upper, by the Cholesky factor of H turned around; U = R⁻¹.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            identity = torch.eye(lower.shape[0])
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.flip(0, 1).contiguous()
        damping *= 10
    raise ModelError("a layer's inputs have no usable second moments on these rows", hint="give more rows with --calibrate")


def hessian_error(change_NK: Tensor, hessian_KK: Tensor) -> float:
    """Return tr(D H Dᵀ): the summed squared error of the layer's outputs on the rows of H."""
    return float(((change_NK @ hessian_KK) * change_NK).sum(dtype=torch.float64))
