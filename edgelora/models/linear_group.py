"""Linear layers on the same input as one product: the heart of the engine, forward and backward.

    y = f(x) Wᵀ + b [+ residual]        W = [W_1; W_2; …], each W_i = W0_i + s_i·B_i A_i, or rounded to the grid that ships

The weights of all members are unpacked into the process's one scratch buffer, the adapters are added there (weight space), one
product follows, and the buffer is free again. Only x is kept for backward: f (a norm or an activation) is computed again.
For a gradient g of y, with h = f(x) (LoRA, arXiv 2106.09685, by the chain rule; rounding straight-through, 1308.3432):

    dh = g W        dB_i = s_i·g_iᵀ (h A_iᵀ)        dA_i = s_i·(g_i B_i)ᵀ h
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from edgelora.models import elementwise, gemm
from edgelora.models.elementwise import Elementwise
from edgelora.models.linear import FrozenLinear, joined, scratch
from edgelora.quant.grid import QuantizedTensor, dequantize


class Trained(Protocol):
    """An adapter's tensors: A `[r, K]`, B `[N, r]`, and the scale of B A."""

    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...


class Member(Protocol):
    """What a group needs of a layer; FrozenLinear and LoRA are members."""

    @property
    def frozen(self) -> FrozenLinear: ...
    @property
    def in_weight_space(self) -> bool: ...
    def trained(self) -> Trained | None: ...
    def fill(self, rows: Tensor) -> None: ...


class LinearGroup:
    """Layers on the same input, whose outputs lie side by side in the order of `members`."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members = [cast(Member, member) for member in members]
        self.frozen = [member.frozen for member in self.members]
        sizes = [layer.out_features for layer in self.frozen]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.num_inputs = self.frozen[0].in_features
        biases = [layer.bias for layer in self.frozen]
        zero = [torch.zeros(size) for size in sizes]
        some = any(bias is not None for bias in biases)
        self.bias = torch.cat([z if b is None else b for b, z in zip(biases, zero, strict=True)]) if some else None
        self.whole = joined([layer.weight.data for layer in self.frozen])
        self.row = max(layer.weight.row_elements for layer in self.frozen)

    @property
    def in_weight_space(self) -> bool:
        return all(member.in_weight_space for member in self.members)

    def trained(self) -> list[tuple[slice, Trained]]:
        """Return (rows of the group's weight, adapter) of the members whose adapter is switched on."""
        found = [(slice(*self.starts[i : i + 2]), member.trained()) for i, member in enumerate(self.members)]
        return [(rows, adapter) for rows, adapter in found if adapter is not None]

    def weight(self) -> Tensor:
        """Return fp32 `[N, K]` as it acts now: the frozen tensor itself, or in the scratch buffer until its next use."""
        if isinstance(self.whole, Tensor) and self.whole.dtype == torch.float32 and not self.trained():
            return self.whole
        out = scratch(self.starts[-1] * self.row).view(-1)[: self.starts[-1] * self.row].view(-1, self.row)
        if isinstance(self.whole, QuantizedTensor) and all(member.frozen is member for member in self.members):
            return dequantize(self.whole, out)
        for i, member in enumerate(self.members):
            member.fill(out[self.starts[i] : self.starts[i + 1]])
        return out[:, : self.num_inputs]

    def parameters(self) -> list[Tensor]:
        return [tensor for _, adapter in self.trained() for tensor in (adapter.a, adapter.b)]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, group: LinearGroup, f: Elementwise | None, scale: float, *_: Tensor
    ) -> Tensor:
        h, stats = (x, ()) if f is None else f.compute(x)
        y = gemm.linear(h, group.weight())
        if group.bias is not None:
            y.add_(group.bias)
        ctx.group, ctx.f, ctx.scale, ctx.adapters = group, f, scale, group.trained()
        ctx.save_for_backward(x, *stats)
        return y if residual is None else torch.add(residual, y, alpha=scale, out=y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *stats = ctx.saved_tensors
        outer, f = grads[0], ctx.f
        grad = outer if ctx.scale == 1.0 else outer * ctx.scale
        dx = gemm.linear(grad, ctx.group.weight().t()) if ctx.needs_input_grad[0] else None
        trained: list[Tensor] = []
        if ctx.adapters:
            h = x if f is None else f.compute(x)[0]
            trained = adapter_gradients(ctx.adapters, grad, h)
            del h
        if dx is not None and f is not None:
            dx = f.gradient(dx, x, *stats)
        return dx, outer if ctx.needs_input_grad[1] else None, None, None, None, *trained


def adapter_gradients(adapters: Sequence[tuple[slice, Trained]], grad_TN: Tensor, h_TK: Tensor) -> list[Tensor]:
    """Return dA, dB of each adapter in turn.

    The adapters' A are stacked to one `[R, K]` and their B put on the diagonal of one `[N, R]`, R the sum of the ranks: three
    products for all of them, each one pass over g or h, which is what products with so few columns cost.
    """
    if len(adapters) == 1:
        rows, adapter = adapters[0]
        a, b = adapter.a, adapter.b
        g = grad_TN if rows == slice(0, grad_TN.shape[1]) else grad_TN[:, rows].contiguous()
    else:
        g = grad_TN
        a = torch.cat([adapter.a for _, adapter in adapters])
        b = torch.zeros(grad_TN.shape[1], a.shape[0])
        _on_diagonal(adapters, b)
    low_TR = gemm.linear(h_TK, a)
    db_RN = gemm.linear(low_TR.t(), g.t())
    da_RK = gemm.linear(gemm.linear(g, b.t()).t(), h_TK.t())
    found, start = [], 0
    for rows, adapter in adapters:
        part = slice(start, start + adapter.a.shape[0])
        columns = slice(None) if len(adapters) == 1 else rows
        found += [da_RK[part] * adapter.scale, (db_RN[part, columns] * adapter.scale).t().contiguous()]
        start = part.stop
    return found


def _on_diagonal(adapters: Sequence[tuple[slice, Trained]], out_NR: Tensor) -> None:
    start = 0
    for rows, adapter in adapters:
        out_NR[rows, start : start + adapter.a.shape[0]] = adapter.b.detach()
        start += adapter.a.shape[0]


def linears(
    x: Tensor, group: LinearGroup, f: Elementwise | None = None, residual: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Return `[T, N]`: the group's layers side by side on f(x) `[T, K]`; with a residual `[T, N]`, residual + scale·y.

    Adapters that have no form in weight space (DoRA, dropout) are computed layer by layer.
    """
    if group.in_weight_space:
        y: Tensor = _Linears.apply(x, residual, group, f, scale, *group.parameters())  # type: ignore[no-untyped-call]
        return y
    h = x if f is None else elementwise.apply(f, x)
    outputs = [cast(nn.Module, member)(h) for member in group.members]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return y if residual is None else torch.add(residual, y, alpha=scale)
