"""LoRA (arXiv 2106.09685), one class for every kind of layer: y = base(x) + scale · B A dropout(x).

Whatever the layer, a weight is seen as a matrix `[N, K]` (outputs, inputs), A is `[r, K]`, B is `[N, r]`, and what ships is
`combine(W0, factors)`. A new kind of layer adds its `forward`; `from_base`, `delta` and `merge` stay as they are.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from edgelora.models.linear import scratch
from edgelora.quant.grid import QuantizedTensor, dequantize, quantize

if TYPE_CHECKING:
    from edgelora.config import FinetuneConfig
    from edgelora.models.linear import FrozenLinear


@dataclass(frozen=True)
class LoRASettings:
    """What decides an adapter's form. `alpha / rank` scales the update; with rsLoRA `alpha / sqrt(rank)`."""

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    seed: int = 0

    @classmethod
    def from_config(cls, config: FinetuneConfig) -> Self:
        alpha = 2.0 * config.rank if config.alpha is None else config.alpha
        return cls(config.rank, alpha, config.rslora, config.dora, config.dropout, config.seed)

    @property
    def scale(self) -> float:
        """alpha / r; rsLoRA (arXiv 2312.03732, eq. 6): alpha / sqrt(r), which keeps the update's size as r grows."""
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank


@dataclass(frozen=True)
class Factors:
    """The trained tensors of one adapter: a `[r, K]`, b `[N, r]`, DoRA's magnitude `[N]` or None, and the scale of b·a."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def combine(weight_NK: Tensor, factors: Factors) -> Tensor:
    """Return the adapted weight, fp32 `[N, K]`: W0 + s·BA, or with DoRA (arXiv 2402.09353, eq. 5)

        W' = m · (W0 + s·BA) / ‖W0 + s·BA‖

    where the norm is that of each output's weights: the paper's column norm, for its W is `[K, N]`.
    """
    adapted = torch.addmm(weight_NK.float(), factors.b.float(), factors.a.float(), alpha=factors.scale)
    if factors.magnitude is None:
        return adapted
    return adapted.mul_((factors.magnitude / torch.linalg.vector_norm(adapted, dim=1)).unsqueeze(1))


class _OnGrid(torch.autograd.Function):
    """x `[T, K]` times the rounded weight Q(W0 + s·BA) `[N, K]`.

    The rounding's gradient is taken as 1 (straight-through, arXiv 1308.3432), so that A and B get LoRA's own gradients,
    dB = s·gᵀ(x Aᵀ) and dA = s·(g B)ᵀ x, while x gets that of the rounded weight.
    """

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, a: Tensor, b: Tensor, scale: float, rounded: QuantizedTensor) -> Tensor:
        ctx.save_for_backward(x_TK, a, b)
        ctx.scale, ctx.rounded = scale, rounded
        return x_TK @ in_scratch(rounded).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x_TK, a, b = ctx.saved_tensors
        grad_TN = grads[0]
        grad_b = (grad_TN.t() @ (x_TK @ a.t())).mul_(ctx.scale)
        grad_a = ((grad_TN @ b).t() @ x_TK).mul_(ctx.scale)
        return (grad_TN @ in_scratch(ctx.rounded) if ctx.needs_input_grad[0] else None), grad_a, grad_b, None, None


def in_scratch(rounded: QuantizedTensor) -> Tensor:
    """Return fp32 `[N, K]` in the process's one unpacking buffer."""
    return dequantize(rounded, scratch(rounded.scales.numel() * rounded.block_size))


class LoRA(nn.Module):
    """An adapter around a frozen linear layer. `enabled = False` gives the base layer's output.

    With `grid`, (bits, block size), the layer computes with the merged weight as it ships: rounded.
    """

    def __init__(self, base: FrozenLinear, factors: Factors, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.path = base.path
        self.scale = factors.scale
        self.dropout = dropout
        self.enabled = True
        self.grid: tuple[int, int] | None = None
        self.lora_A = nn.Parameter(factors.a)
        self.lora_B = nn.Parameter(factors.b)
        self.lora_magnitude_vector = None if factors.magnitude is None else nn.Parameter(factors.magnitude)
        self._norms: tuple[tuple[int, int], Tensor] | None = None
        self._rounded: tuple[tuple[int, int], QuantizedTensor] | None = None

    @classmethod
    def from_base(cls, base: FrozenLinear, settings: LoRASettings) -> Self:
        """Return a new adapter: A Kaiming-uniform with bound 1 / sqrt(K), B zero, so that training starts at the base.

        A depends on the seed and the layer's path alone: neither on the order nor on the choice of other adapters.
        """
        # One number of 32 bits: torch's generator on a CPU ignores the bits above.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{settings.seed} {base.path}".encode()))
        bound = 1.0 / math.sqrt(base.in_features)
        a = torch.empty(settings.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        magnitude = torch.linalg.vector_norm(base.weight_fp32(), dim=1) if settings.dora else None
        return cls(base, Factors(a, torch.zeros(base.out_features, settings.rank), settings.scale, magnitude), settings.dropout)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def factors(self) -> Factors:
        magnitude = self.lora_magnitude_vector
        return Factors(
            self.lora_A.detach(), self.lora_B.detach(), self.scale, None if magnitude is None else magnitude.detach()
        )

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Take the tensors of `factors`, which have the same rank; the scale becomes theirs."""
        assert factors.a.shape == self.lora_A.shape
        self.scale = factors.scale
        self.lora_A.copy_(factors.a)
        self.lora_B.copy_(factors.b)
        if self.lora_magnitude_vector is not None and factors.magnitude is not None:
            self.lora_magnitude_vector.copy_(factors.magnitude)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., K]` to `[..., N]`."""
        if not self.enabled:
            plain: Tensor = self.base(x)
            return plain
        flat_TK = x.reshape(-1, x.shape[-1])
        if self.grid is not None:
            return self._on_grid(flat_TK).view(*x.shape[:-1], -1)
        base_TN: Tensor = self.base(flat_TK)
        low_TR = nn.functional.dropout(flat_TK, self.dropout, self.training) @ self.lora_A.t()
        if self.lora_magnitude_vector is None:
            # In place: the base layer's output is nobody else's, and a second [T, N] tensor would be.
            out_TN = base_TN.addmm_(low_TR, self.lora_B.t(), alpha=self.scale)
        else:
            out_TN = self._rescale(base_TN, low_TR, self.lora_magnitude_vector)
        return out_TN.view(*x.shape[:-1], -1)

    def _rescale(self, base_TN: Tensor, low_TR: Tensor, magnitude_N: Tensor) -> Tensor:
        """DoRA: (x W0ᵀ + s·x AᵀBᵀ) · m / ‖W0 + s·BA‖ + bias, the norm taken as a constant (the paper's section 4.3)."""
        bias = self.base.bias
        plain_TN = base_TN if bias is None else base_TN - bias
        out_TN = torch.addmm(plain_TN, low_TR, self.lora_B.t(), alpha=self.scale) * (magnitude_N / self._row_norms())
        return out_TN if bias is None else out_TN + bias

    def _row_norms(self) -> Tensor:
        """Return ‖W0 + s·BA‖ of each output `[N]`, computed once after each change of A and B."""
        versions = (self.lora_A._version, self.lora_B._version)
        if self._norms is None or self._norms[0] != versions:
            with torch.no_grad():
                self._norms = versions, torch.linalg.vector_norm(self.base.weight_fp32() + self.delta(), dim=1)
        return self._norms[1]

    def _on_grid(self, x_TK: Tensor) -> Tensor:
        y_TN: Tensor = _OnGrid.apply(x_TK, self.lora_A, self.lora_B, self.scale, self.rounded())  # type: ignore[no-untyped-call]
        return y_TN if self.base.bias is None else y_TN.add_(self.base.bias)

    def rounded(self) -> QuantizedTensor:
        """Return the merged weight on the grid, rounded once after each change of A and B. Needs `grid`."""
        assert self.grid is not None
        versions = (self.lora_A._version, self.lora_B._version)
        if self._rounded is None or self._rounded[0] != versions:
            with torch.no_grad():
                self._rounded = versions, quantize(self.merge(), *self.grid)
        return self._rounded[1]

    def delta(self) -> Tensor:
        """Return s·BA, fp32 `[N, K]`."""
        return self.scale * (self.lora_B.detach() @ self.lora_A.detach())

    def merge(self) -> Tensor:
        """Return the weight that acts as base and adapter together, fp32 `[N, K]`."""
        return combine(self.base.weight_fp32(), self.factors)
