"""The LM head: summed negative log-likelihood and greedy choice without a `[tokens, vocabulary]` tensor.

The vocabulary is walked in tiles with an online log-sum-exp (as in FlashAttention, arXiv 2205.14135, with the head's
rows in the place of keys and values): for a token with state h, running maximum m, sum s and weighted row sum a,

    nll = log s + m - z_target          d nll / d h = a / s - w_target          z = w · h

so that one pass over the head gives both the loss and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgelora.models import gemm
from edgelora.models.linear import FrozenWeight

TILE_ROWS = 2048  # rows of the head unpacked at once: with their logits they stay in a processor's cache
RELEASE_TILES = 8  # tiles after which their part of the table may go
TILE_LOGITS = 1 << 20  # logits at once: 4 MB


@dataclass(frozen=True)
class Head:
    """logits = softcap(scale * h Wᵀ) + b, softcap(z) = cap * tanh(z / cap), with W `[V, H]` and b `[V]`.

    release: called now and then on the way through W, so that the part behind need not stay in memory.
    """

    weight: FrozenWeight
    scale: float = 1.0
    softcap: float = 0.0
    release: Callable[[], None] | None = None
    bias: Tensor | None = None

    def nll(self, hidden_SH: Tensor, targets_S: Tensor) -> Tensor:
        """Return the summed negative log-likelihood of the targets, a scalar with a gradient to `hidden_SH`."""
        total: Tensor = _NegativeLogLikelihood.apply(hidden_SH, targets_S, self)  # type: ignore[no-untyped-call]
        return total

    def logits(self, hidden_SH: Tensor) -> Tensor:
        """Return `[S, V]`: for tests and for the few positions of generation."""
        return torch.cat(list(self.tiles(hidden_SH)), -1)

    def tiles(self, hidden_SH: Tensor) -> Iterator[Tensor]:
        """Yield the logits of TILE_ROWS tokens of the vocabulary after the other, `[S, at most TILE_ROWS]`."""
        for start, weight_VH in self._tiles():
            yield self._logits(hidden_SH, weight_VH, start)

    def argmax(self, hidden_SH: Tensor) -> Tensor:
        """Return the most likely token of each position, int64 `[S]`; the first of equals."""
        best = hidden_SH.new_full((hidden_SH.shape[0],), float("-inf"))
        choice = torch.zeros(hidden_SH.shape[0], dtype=torch.int64)
        for start, weight_VH in self._tiles():
            value, index = self._logits(hidden_SH, weight_VH, start).max(-1)
            better = value > best
            best = torch.where(better, value, best)
            choice = torch.where(better, index + start, choice)
        return choice

    def _tiles(self) -> Iterator[tuple[int, Tensor]]:
        rows = self.weight.shape[0]
        for start in range(0, rows, TILE_ROWS):
            yield start, self.weight.tile(start, min(start + TILE_ROWS, rows))
            if self.release is not None and (
                start // TILE_ROWS % RELEASE_TILES == RELEASE_TILES - 1 or start + TILE_ROWS >= rows
            ):
                self.release()

    def _logits(self, hidden_SH: Tensor, weight_VH: Tensor, first: int) -> Tensor:
        """Return the logits of the tokens from `first` on, whose rows of W are given."""
        logits = self._finish(gemm.linear(hidden_SH, weight_VH))
        return logits if self.bias is None else logits.add_(self.bias[first : first + logits.shape[-1]])

    def _finish(self, logits: Tensor) -> Tensor:
        """Scale and cap raw logits in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def _slope(self, logits: Tensor) -> Tensor | float:
        """Return d logits / d (W h) for finished logits."""
        return self.scale * (1 - (logits / self.softcap) ** 2) if self.softcap else self.scale


class _NegativeLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SH: Tensor, targets_S: Tensor, head: Head) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        loss, gradient = _online(hidden_SH.detach(), targets_S, head, with_gradient=wanted)
        if wanted:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def _online(hidden_SH: Tensor, targets_S: Tensor, head: Head, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss and, if wanted, its gradient `[S, H]` (else zeros of no use)."""
    num_tokens = hidden_SH.shape[0]
    maximum = torch.full((num_tokens, 1), float("-inf"))
    total = torch.zeros(num_tokens, 1)
    pulled = torch.zeros_like(hidden_SH) if with_gradient else hidden_SH.new_empty(0)
    step = max(1, TILE_LOGITS // TILE_ROWS)
    for first, weight_VH in head._tiles():
        for start in range(0, num_tokens, step):
            part = slice(start, start + step)
            logits = head._logits(hidden_SH[part], weight_VH, first)
            slope = head._slope(logits) if with_gradient else 1.0
            higher = torch.maximum(maximum[part], logits.amax(-1, keepdim=True))
            shrink = torch.exp(maximum[part] - higher)
            odds = logits.sub_(higher).exp_()
            total[part] = total[part] * shrink + odds.sum(-1, keepdim=True)
            maximum[part] = higher
            if with_gradient:
                if not isinstance(slope, float) or slope != 1.0:
                    odds.mul_(slope)
                pulled[part].mul_(shrink).add_(gemm.linear(odds, weight_VH.t()))
    rows_SH = head.weight.rows(targets_S)
    target = head._finish((hidden_SH * rows_SH).sum(-1, keepdim=True))
    slope_of_target = head._slope(target)
    target = target if head.bias is None else target + head.bias[targets_S].unsqueeze(-1)
    loss = (total.log() + maximum - target).sum()
    if with_gradient:
        pulled.div_(total).sub_(rows_SH.mul_(slope_of_target))
    return loss, pulled
