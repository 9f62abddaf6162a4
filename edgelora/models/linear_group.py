"""Linear layers on the same input as one product: the heart of the engine, forward and backward.

    y = h Wᵀ + (h Aᵀ) (sB)ᵀ + b [+ residual]        h = f(x)        W = [W_1; W_2; …]

The frozen weights of all members are unpacked into the process's one scratch buffer, one product follows, and the buffer is
free again; the adapters' A are stacked, and their s·B put on the diagonal of one matrix. A member on the grid that ships is
unpacked as Q(W0 + s·BA) instead, and its adapter adds nothing more. Kept for backward are x and the few columns of l = h Aᵀ;
f (a norm or an activation) is computed again. For a gradient g of y (LoRA, arXiv 2106.09685, by the chain rule; the gradient of
rounding taken as 1, 1308.3432):

    dh = g W + (g sB) A        dA = (g sB)ᵀ h        dB = s·gᵀ l

Block scales of W that are trained get theirs from gᵀ h, W's own gradient (scale_gradient.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from edgelora.models import elementwise, gemm
from edgelora.models.elementwise import Elementwise
from edgelora.models.linear import FrozenLinear, joined, part_of, scratch, write
from edgelora.quant.grid import QuantizedTensor, round_to_int8

Weight = Tensor | QuantizedTensor
TILE = 1 << 23  # elements unpacked at once: 32 MB


class Factors(Protocol):
    """An adapter's tensors: A `[r, K]`, B `[N, r]`, and the scale of B A."""

    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...


class Member(Protocol):
    """What a group needs of a layer; FrozenLinear and LoRA are members.

    trained: the parameters, and how they act: their first rows and columns are the parameters; None without an adapter.
    apart: whether the adapter's product is added to the weight's, and not part of `weight_data`, the weight as it is stored.
    input_block: the block size by which the input is rounded to int8, whose gradient is taken as 1; 0: taken as it is.
    scaled: the trained parameter of the weight's block scales, None where they are frozen; scale_gradient: its gradient for
    the gradient `[T, N]` of this layer's output and the input `[T, K]`.
    """

    @property
    def frozen(self) -> FrozenLinear: ...
    @property
    def in_weight_space(self) -> bool: ...
    @property
    def apart(self) -> bool: ...
    @property
    def input_block(self) -> int: ...
    def trained(self) -> tuple[Factors, Factors] | None: ...
    def weight_data(self) -> Weight: ...
    def scaled(self) -> Tensor | None: ...
    def scale_gradient(self, grad_TN: Tensor, h_TK: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Stacked:
    """The adapters of a group as one: a `[R, K]`, scaled_b `[N, R]` with each adapter's own rows and columns."""

    a: Tensor
    scaled_b: Tensor
    parts: tuple[tuple[slice, slice, int, float], ...]  # of each adapter: rows, columns, trained rank, scale
    acting: Tensor | None  # scaled_b without the adapters that are in the weight already; None if all of them are


class LinearGroup:
    """Layers on the same input, whose outputs lie side by side in the order of `members`."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.modules = list(members)
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

    def trained(self) -> list[tuple[slice, Member, Factors, Factors]]:
        """Return rows of the group's weight, layer, parameters and how they act, of the adapters that are switched on."""
        found = [(slice(*self.starts[i : i + 2]), member, member.trained()) for i, member in enumerate(self.members)]
        return [(rows, member, *both) for rows, member, both in found if both is not None]

    @torch.no_grad()
    def add_adapters(self, h_TK: Tensor, y_TN: Tensor | None) -> Tensor:
        """Add s·(h Aᵀ) Bᵀ of the adapters that are apart from the weight to y, if it is given; return h Aᵀ, `[T, R]`."""
        trained = self.trained()
        if not trained:
            return h_TK.new_empty(0)
        low_TR = gemm.linear(h_TK, _side_by_side([acting.a for *_, acting in trained]))
        start = 0
        for rows, member, _, acting in trained:
            stop = start + acting.a.shape[0]
            if member.apart and y_TN is not None:
                y_TN[:, rows].addmm_(low_TR[:, start:stop], acting.b.t(), alpha=acting.scale)
            start = stop
        return low_TR

    @torch.no_grad()
    def stacked(self) -> Stacked | None:
        trained = self.trained()
        if not trained:
            return None
        a = _side_by_side([acting.a for *_, acting in trained])
        scaled_b = torch.zeros(self.starts[-1], a.shape[0])
        parts, start, apart = [], 0, []
        for rows, member, parameters, acting in trained:
            columns = slice(start, start + acting.a.shape[0])
            torch.mul(acting.b, acting.scale, out=scaled_b[rows, columns])
            parts.append((rows, columns, parameters.a.shape[0], parameters.scale))
            apart.append(member.apart)
            start = columns.stop
        if all(apart) or not any(apart):
            return Stacked(a, scaled_b, tuple(parts), scaled_b if all(apart) else None)
        only = scaled_b.clone()
        for (_, columns, _, _), counts in zip(parts, apart, strict=True):
            only[:, columns].mul_(counts)
        return Stacked(a, scaled_b, tuple(parts), only)

    def product(self, h_TK: Tensor) -> Tensor:
        """Return h Wᵀ `[T, N]`, W without what is apart."""
        block = min(0 if member.apart else member.input_block for member in self.members)
        h_TK = round_to_int8(h_TK, block) if block else h_TK
        y_TN: Tensor | None = None
        for rows, weight in self.tiles():
            part = gemm.product(h_TK, weight)
            if part.shape[1] == self.starts[-1]:
                return part
            y_TN = h_TK.new_empty(h_TK.shape[0], self.starts[-1]) if y_TN is None else y_TN
            y_TN[:, rows] = part
        assert y_TN is not None
        return y_TN

    def pulled_back(self, grad_TN: Tensor) -> Tensor:
        """Return g W `[T, K]`, W without what is apart."""
        dh_TK: Tensor | None = None
        for rows, weight in self.tiles():
            part = gemm.product(grad_TN[:, rows], weight.t())
            dh_TK = part if dh_TK is None else dh_TK.add_(part)
        assert dh_TK is not None
        return dh_TK

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, weight of these rows `[n, K]` in the products' dtype): frozen tensors as they are, or unpacked in the
        scratch buffer. There they take TILE elements at most, and live until its next use.
        """
        joint = self.whole if all(member.apart for member in self.members) else None
        weights = [member.weight_data() for member in self.members] if joint is None else [joint]
        first, dtype = 0, gemm.weight_dtype()
        if all(isinstance(weight, Tensor) and weight.dtype == dtype for weight in weights):
            for weight in weights:
                yield slice(first, first + weight.shape[0]), cast(Tensor, weight)
                first += weight.shape[0]
            return
        for pieces in packed(weights, max(1, TILE // max(1, self.row))):
            height = sum(piece.shape[0] for piece in pieces)
            out, place = scratch(height * self.row, dtype)[: height * self.row].view(height, self.row), 0
            for piece in pieces:
                write(piece, out[place : place + piece.shape[0]])
                place += piece.shape[0]
            yield slice(first, first + height), out[:, : self.num_inputs]
            first += height

    def parameters(self) -> list[Tensor]:
        """Return A and B of each adapter, then the trained block scales: the order of `_Linears`' gradients."""
        factors = [tensor for _, _, parameters, _ in self.trained() for tensor in (parameters.a, parameters.b)]
        return factors + [scales for member in self.members if (scales := member.scaled()) is not None]

    def scaled(self) -> list[tuple[Member, slice]]:
        """Return the layers whose block scales are trained, and their rows of the group's weight."""
        rows = [(member, slice(*self.starts[i : i + 2])) for i, member in enumerate(self.members)]
        return [(member, own) for member, own in rows if member.scaled() is not None]


def packed(weights: Sequence[Weight], most: int) -> list[list[Weight]]:
    """Cut weights into pieces of at most so many rows, and put neighbours together that have no more than that."""
    packs: list[list[Weight]] = []
    height = most
    for weight in weights:
        for start in range(0, weight.shape[0], most):
            piece = part_of(weight, start, min(start + most, weight.shape[0]))
            if height + piece.shape[0] > most:
                packs.append([])
                height = 0
            packs[-1].append(piece)
            height += piece.shape[0]
    return packs


def _side_by_side(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(list(factors))


How = tuple[float, bool]  # the scale of y beside the residual, and whether y itself is not wanted


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, group: LinearGroup, f: Elementwise | None, how: How, *_: Tensor
    ) -> Tensor:
        h, stats = (x, ()) if f is None else f.compute(x)
        scale, unfinished = how
        y = h.new_empty(h.shape[0], group.starts[-1]) if unfinished else group.product(h)
        low_TR = group.add_adapters(h, None if unfinished else y)
        ctx.group, ctx.f, ctx.scale = group, f, scale
        ctx.save_for_backward(x, low_TR, *stats)
        if unfinished:
            return y
        if group.bias is not None:
            y.add_(group.bias)
        return y if residual is None else torch.add(residual, y, alpha=scale, out=y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, low_TR, *stats = ctx.saved_tensors
        group, f, outer = ctx.group, ctx.f, grads[0]
        wants_x, wants_residual = ctx.needs_input_grad[:2]
        grad = outer if ctx.scale == 1.0 else outer * ctx.scale
        dx = group.pulled_back(grad) if wants_x else None
        stacked, scaled = group.stacked(), group.scaled()
        h = x if f is None or (stacked is None and not scaled) else f.compute(x)[0]
        trained = [member.scale_gradient(grad[:, own], h) for member, own in scaled]
        if stacked is not None:
            pulled_TR = gemm.linear(grad, stacked.scaled_b.t())
            trained = adapter_gradients(stacked, pulled_TR, low_TR, grad, h) + trained
            if dx is not None and stacked.acting is not None:
                if stacked.acting is not stacked.scaled_b:
                    pulled_TR = gemm.linear(grad, stacked.acting.t())
                dx.addmm_(pulled_TR, stacked.a)
        del h
        if dx is not None and f is not None:
            dx = f.gradient(dx, x, *stats)
        return dx, outer if wants_residual else None, None, None, None, *trained


def adapter_gradients(stacked: Stacked, pulled_TR: Tensor, low_TR: Tensor, grad_TN: Tensor, h_TK: Tensor) -> list[Tensor]:
    """Return dA, dB of each adapter in turn; `pulled` is g sB, `low` h Aᵀ.

    The transposed operands keep these products, which have few rows, as fast as reading g and h once.
    """
    da_RK = gemm.linear(pulled_TR.t(), h_TK.t())
    db_RN = gemm.linear(low_TR.t(), grad_TN.t())
    found = []
    for rows, columns, rank, scale in stacked.parts:
        own = slice(columns.start, columns.start + rank)
        found += [da_RK[own], (db_RN[own, rows] * scale).t().contiguous()]
    return found


def linears(
    x: Tensor, group: LinearGroup, f: Elementwise | None = None, residual: Tensor | None = None, scale: float = 1.0,
    *, unfinished: bool = False,
) -> Tensor:  # fmt: skip
    """Return `[T, N]`: the group's layers side by side on f(x) `[T, K]`; with a residual `[T, N]`, residual + scale·y.

    unfinished: only the gradients are wanted; what the tensor holds is not said.

    Adapters that have no form in weight space (DoRA, dropout) are computed layer by layer.
    """
    if group.in_weight_space:
        y: Tensor = _Linears.apply(x, residual, group, f, (scale, unfinished), *group.parameters())  # type: ignore[no-untyped-call]
        return y
    h = x if f is None else elementwise.apply(f, x)
    outputs = [module(h) for module in group.modules]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return y if residual is None else torch.add(residual, y, alpha=scale)
