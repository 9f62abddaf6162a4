"""LoRA (arXiv 2106.09685), one class for every kind of layer: y = base(x) + scale · B A dropout(x).

Whatever the layer, a weight is seen as a matrix `[N, K]` (outputs, inputs), A is `[r, K]`, B is `[N, r]`, and what ships is
`combine(W0, factors)`. A new kind of layer adds its `forward`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from edgelora.adapters.initialize import FROM_WEIGHT, INITIALIZATIONS, Start, from_pattern
from edgelora.adapters.learned_scales import times
from edgelora.models.convolution import GEOMETRY, FrozenConv
from edgelora.models.linear import FrozenLinear
from edgelora.models.linear_group import LinearGroup, linears
from edgelora.models.scale_gradient import of_codes, scale_gradient, telling
from edgelora.quant.grid import QuantizedTensor, dequantize, quantize, unwritten

if TYPE_CHECKING:
    from edgelora.config import FinetuneConfig

TOKENS_PER_SCALE = 4  # the gradient of block scales is a matrix product more


@dataclass(frozen=True)
class LoRASettings:
    """What decides an adapter's form. The patterns give layers a rank and an alpha of their own, by PEFT's rule.

    What does not go together is refused before (initialize.refuse_combinations).
    """

    rank: int = 8
    alpha: float | None = None  # None: 2 × the layer's rank
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    seed: int = 0
    init: str = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: FinetuneConfig) -> Self:
        return cls(config.rank, config.alpha, config.rslora, config.dora, config.dropout, config.seed, config.init,
                   config.rank_pattern or {}, config.alpha_pattern or {})  # fmt: skip

    def rank_of(self, path: str) -> int:
        return from_pattern(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """alpha / r; rsLoRA (arXiv 2312.03732, eq. 6): alpha / sqrt(r), which keeps the update's size as r grows."""
        rank = self.rank_of(path)
        alpha = from_pattern(self.alpha_pattern, path, 2.0 * rank if self.alpha is None else self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


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


class LoRA(nn.Module):
    """An adapter around a frozen linear layer or convolution. `enabled = False` gives the base layer's output.

    With `grid`, (bits, block size), the layer computes with the merged weight as it ships: rounded, unless `unrounded` is set.
    What is rounded is `start` + s·BA, where a start that makes up for errors was given (train/start.py). Block scales are those
    of `quantize` times exp(`log_scales`), where these are trained too; unrounded weights are multiplied by it likewise.
    `shipped` is the rounded weight of a run that is over. With `initial`, (A0, B0), the layer acts by what its product has
    become since: s·(BA - B0 A0), of rank 2r (initialize.py).
    """

    def __init__(self, base: FrozenLinear | FrozenConv, factors: Factors, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.path = base.path
        self.scale = factors.scale
        self.dropout = dropout
        self.enabled = True
        self.grid: tuple[int, int] | None = None
        self.unrounded = False
        self.input_block = 0  # by which the input is rounded to int8 there
        self.log_scales: nn.Parameter | None = None
        self.scale_block = 0  # inputs that share one of them
        self.start: QuantizedTensor | None = None
        self.shipped: QuantizedTensor | None = None
        self.initial: tuple[Tensor, Tensor] | None = None
        self.lora_A = nn.Parameter(factors.a)
        self.lora_B = nn.Parameter(factors.b)
        self.lora_magnitude_vector = None if factors.magnitude is None else nn.Parameter(factors.magnitude)
        self._norms: tuple[tuple[int, int], Tensor] | None = None
        self._alone: LinearGroup | None = None
        self._rounded: tuple[tuple[int, ...], QuantizedTensor] | None = None

    @classmethod
    def from_base(cls, base: FrozenLinear | FrozenConv, settings: LoRASettings) -> Self:
        """Return a new adapter as initialize.py begins it, so that training starts at the base.

        What is random depends on the seed and the layer's path alone: neither on the order nor on the choice of other adapters.
        """
        # One number of 32 bits: torch's generator on a CPU ignores the bits above.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{settings.seed} {base.path}".encode()))
        rank, scale = settings.rank_of(base.path), settings.scale_of(base.path)
        shape = (base.out_features, base.in_features)
        # The one unpacking buffer: layer by layer, memory of their own would leave holes between what stays.
        unpacked = base.in_scratch
        a, b = INITIALIZATIONS[settings.init](Start(unpacked, shape, rank, scale, generator))
        magnitude = torch.linalg.vector_norm(unpacked(), dim=1) if settings.dora else None
        layer = cls(base, Factors(a.contiguous(), b.contiguous(), scale, magnitude), settings.dropout)
        if settings.init in FROM_WEIGHT:
            layer.initial = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        return layer

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def factors(self) -> Factors:
        """The adapter as it acts and ships, apart from its parameters' gradients: with `initial`, [A; A0] and [B, -B0]."""
        a, b, magnitude = self.lora_A.detach(), self.lora_B.detach(), self.lora_magnitude_vector
        if self.initial is not None:
            a, b = torch.cat([a, self.initial[0]]), torch.cat([b, -self.initial[1]], 1)
        return Factors(a, b, self.scale, None if magnitude is None else magnitude.detach())

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Take the tensors of `factors`, which have the same rank as this adapter's own; the scale becomes theirs."""
        rank = self.lora_A.shape[0]
        assert factors.rank == (rank if self.initial is None else 2 * rank)
        self.scale = factors.scale
        self.lora_A.copy_(factors.a[:rank])
        self.lora_B.copy_(factors.b[:, :rank])
        if self.initial is not None:
            self.initial[0].copy_(factors.a[rank:])
            self.initial[1].copy_(-factors.b[:, rank:])
        if self.lora_magnitude_vector is not None and factors.magnitude is not None:
            self.lora_magnitude_vector.copy_(factors.magnitude)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., K]` to `[..., N]`."""
        if not self.enabled:
            plain: Tensor = self.base(x)
            return plain
        if isinstance(self.base, FrozenConv):
            return self.base.adapted(x, self, self.lora_A, self.lora_B)
        flat_TK = x.reshape(-1, x.shape[-1])
        if self.in_weight_space:
            self._alone = self._alone or LinearGroup([self])
            return linears(flat_TK, self._alone).view(*x.shape[:-1], -1)
        base_TN: Tensor = self.base(flat_TK)
        low_TR = nn.functional.dropout(flat_TK, self.dropout, self.training) @ self.lora_A.t()
        if self.lora_magnitude_vector is None:
            out_TN = base_TN.addmm_(low_TR, self.lora_B.t(), alpha=self.scale)  # nobody else has the base layer's output
        else:
            out_TN = self._rescale(base_TN, low_TR, self.lora_magnitude_vector)
        return out_TN.view(*x.shape[:-1], -1)

    @property
    def frozen(self) -> FrozenLinear:
        """The frozen layer under the adapter (linear_group.Member)."""
        assert isinstance(self.base, FrozenLinear)
        return self.base

    def __getattr__(self, name: str) -> Any:  # transformers' code asks a convolution for its geometry
        return getattr(self.base, name) if name in (*GEOMETRY, "weight") else super().__getattr__(name)

    @property
    def in_weight_space(self) -> bool:
        """Whether the adapter acts through the weight alone: not with dropout on its input, nor with DoRA, whose norms are
        constants to its gradient, nor while somebody listens to its input (eva.py)."""
        if self._forward_pre_hooks:
            return False
        return not self.enabled or (self.lora_magnitude_vector is None and not (self.dropout and self.training))

    @property
    def apart(self) -> bool:
        """Whether s·BA is added to the frozen layer's product, and is not part of the weight, as it is on the grid."""
        return not self.enabled or not (self.rounds or self.log_scales is not None)

    @property
    def rounds(self) -> bool:
        return self.grid is not None and not self.unrounded

    def trained(self) -> tuple[Factors, Factors] | None:
        """Return the parameters themselves, and how they act, unless the adapter is switched off."""
        return (Factors(self.lora_A, self.lora_B, self.scale), self.factors) if self.enabled else None

    def weight_data(self) -> Tensor | QuantizedTensor:
        """Return the frozen weight `[N, K]` as it is stored, or on the grid Q(W0 + s·BA), or that weight unrounded."""
        if self.apart:
            return self.frozen.weight_data()
        if self.rounds or self.log_scales is None:
            return self.rounded()
        return times(self.merge(), self.log_scales.detach(), self.scale_block)

    def learn_scales(self, block_size: int, logs: Tensor | None = None) -> None:
        """Let block scales be trained with the adapter, from now on a parameter more; `logs`: what they have become."""
        logs = torch.zeros(self.out_features, -(-self.in_features // block_size)) if logs is None else logs
        self.log_scales, self.scale_block, self._rounded = nn.Parameter(logs), block_size, None

    def scaled(self) -> Tensor | None:
        """Return the trained logarithms of the block scales, None where they are not trained or the layer is not rounded."""
        return self.log_scales if self.enabled and self.rounds else None

    def scale_gradient(self, grad_TN: Tensor, h_TK: Tensor) -> Tensor:
        """Return the gradient of `log_scales`: s·Σ dW (q - z) over each block, s = bf16(s_max · exp(log_scales)).

        The codes of W / s_max do not depend on it (LR-QAT, arXiv 2406.06385, section 3); that s is bf16 counts as nothing."""
        tensor = self.rounded()
        few = telling(grad_TN, h_TK, -(-len(h_TK) // TOKENS_PER_SCALE))
        return scale_gradient(*few, tensor.block_size, of_codes(tensor)).mul_(tensor.scales)

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

    def rounded(self) -> QuantizedTensor:
        """Return the merged weight on the grid, rounded once after each change of what is trained, in the same memory."""
        if self.shipped is not None:
            return self.shipped
        assert self.grid is not None
        versions = tuple(p._version for p in (self.lora_A, self.lora_B, self.log_scales) if p is not None)
        if self._rounded is None or self._rounded[0] != versions:
            with torch.inference_mode(False), torch.no_grad():
                last = self._rounded[1] if self._rounded is not None and self._rounded[1].bits == self.grid[0] else None
                tensor = quantize(self.to_round(), *self.grid, into=last)
                if self.log_scales is not None:
                    tensor.scales.copy_(torch.exp(self.log_scales).mul_(tensor.scales).bfloat16())
                self._rounded = versions, tensor
        return self._rounded[1]

    def make_room(self) -> None:
        """Take the memory of the rounded weight before its first rounding."""
        if self.grid is not None and self._rounded is None:
            self._rounded = (), unwritten(self.out_features, self.in_features, *self.grid)

    def to_round(self) -> Tensor:
        """Return the weight that is rounded: `start`, or where there is none W0, with the adapter in it, fp32 `[N, K]`."""
        return self.merge() if self.start is None else combine(dequantize(self.start), self.factors)

    def begin_with(self, start: QuantizedTensor | None) -> None:
        """Round `start` + s·BA from now on; W0 + s·BA without one."""
        self.start, self._rounded = start, None

    def ship(self, tensor: QuantizedTensor) -> None:
        """Compute with this weight from now on: training is over."""
        self.shipped, self._rounded = tensor, None

    def delta(self) -> Tensor:
        """Return what the adapter adds to the weight, s·BA or s·(BA - B0 A0), fp32 `[N, K]`."""
        factors = self.factors
        return factors.scale * (factors.b @ factors.a)

    def merge(self) -> Tensor:
        """Return the weight that acts as base and adapter together, fp32 `[N, K]`."""
        return combine(self.base.weight_fp32(), self.factors)
