"""The gradient of block scales: dL/ds = Σ dW · dw/ds over the block, where dW = gᵀ h is the weight's own gradient.

dW `[N, K]` is as large as the weight; it is computed a few rows at a time and summed up at once, so that it never exists whole.
The rule of LSQ (arXiv 1902.08153, eq. 3): dw/ds is q - z where the codes q are fixed; where a weight v is rounded in the
forward pass, it is q - z - v / s inside the range of the codes and q - z outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgelora.models import gemm
from edgelora.quant.grid import QuantizedTensor, signed_codes

ROWS_AT_ONCE = 1 << 20  # elements of dW: 4 MB

Slope = Callable[[int, int], Tensor]


@torch.no_grad()
def scale_gradient(grad_TN: Tensor, h_TK: Tensor, block_size: int, slope: Slope) -> Tensor:
    """Return dL/ds `[N, ceil(K / block_size)]` for the gradient g `[T, N]` of y = h Wᵀ and its input h `[T, K]`.

    slope(start, stop): dw/ds of these rows, `[n, ceil(K / block_size), block_size]` of any type; beyond K anything.
    """
    num_outputs, num_inputs = grad_TN.shape[1], h_TK.shape[1]
    num_blocks = -(-num_inputs // block_size)
    padding = num_blocks * block_size - num_inputs
    padded = torch.nn.functional.pad(h_TK, (0, padding)) if padding else h_TK
    found = torch.empty(num_outputs, num_blocks)
    step = max(1, ROWS_AT_ONCE // (num_blocks * block_size))
    for start in range(0, num_outputs, step):
        stop = min(start + step, num_outputs)
        weight_NK = gemm.product(  # in bf16 where the weights are: what is summed differs by 0.3% then
            grad_TN[:, start:stop].t(), padded.t()
        )
        blocks = weight_NK.view(stop - start, num_blocks, block_size).mul_(slope(start, stop))
        torch.sum(blocks, -1, out=found[start:stop])
    return found


@torch.no_grad()
def telling(grad_TN: Tensor, h_TK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` rows of g and h, so weighed that gᵀ h stays what it was on average.

    The probability of a token is in proportion to ‖g_t‖·‖h_t‖, which has the least variance (Drineas, Kannan and Mahoney, Fast
    Monte Carlo algorithms for matrices I, 2006, lemma 4): an answer's tokens are looked at, most of a prompt's are not. Places
    at even distances along the sum of all tokens choose, not a random number; a token that fills several is taken as often.
    """
    if count >= len(h_TK):
        return grad_TN, h_TK
    size_T = torch.linalg.vector_norm(grad_TN, dim=1).mul_(torch.linalg.vector_norm(h_TK, dim=1))
    ends = torch.cumsum(size_T, 0)
    step = ends[-1] / count
    tokens = torch.searchsorted(ends, (torch.arange(count) + 0.5) * step).clamp_(max=len(ends) - 1)
    factors = step / size_T[tokens].clamp_min(torch.finfo(torch.float32).tiny)
    return grad_TN[tokens].mul_(factors.unsqueeze(1)), h_TK[tokens]


def of_codes(tensor: QuantizedTensor) -> Slope:
    """Return dw/ds of fixed codes: q - z, int8."""
    return lambda start, stop: signed_codes(tensor.codes[start:stop], tensor.bits)
