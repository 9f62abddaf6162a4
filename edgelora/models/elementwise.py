"""Norms and activations with frozen parameters and few temporaries.

Each is a pair of plain functions, `compute` and `gradient`, so that a linear layer can take it as its prologue: what the
layer multiplies is computed again from the prologue's input in backward, and only that input is kept.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Elementwise(Protocol):
    """A function of each token's values alone."""

    def compute(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y, in new memory, and what `gradient` needs beside x: one number per token at most."""

    def gradient(self, grad: Tensor, x: Tensor, *stats: Tensor) -> Tensor:
        """Return the gradient of x for that of y; `grad` may be overwritten."""


class FrozenNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467, eq. 4) or LayerNorm (1607.06450) over the last dimension.

    `weight` includes the family's offset.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, path: str, kind: str, eps: float, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.path, self.kind, self.eps = path, kind, eps
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return apply(self, x)

    def compute(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.kind == "layer":
            y, mean, inverse = torch.native_layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
            return y, (mean, inverse)
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean.add_(self.eps).rsqrt_()
        return (x * inverse).mul_(self.weight), (inverse,)

    def gradient(self, grad: Tensor, x: Tensor, *stats: Tensor) -> Tensor:
        if self.kind == "layer":
            mask = [True, False, False]
            grads = torch.ops.aten.native_layer_norm_backward(grad, x, [x.shape[-1]], *stats, self.weight, self.bias, mask)
            first: Tensor = grads[0]
            return first
        (inverse,) = stats
        grad = grad * self.weight
        along = torch.linalg.vecdot(grad, x).unsqueeze(-1).div_(x.shape[-1]).mul_(inverse).mul_(inverse)
        return grad.addcmul_(x, along, value=-1).mul_(inverse)


class Activation:
    """act(x), or with `gated` act(gate) * up (GLU variants, arXiv 2002.05202) of x = [gate, up] along the last dimension."""

    def __init__(self, kind: str, *, gated: bool) -> None:
        self.kind, self.gated = kind, gated

    def compute(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.gated:
            return self._act(x), ()
        gate, up = x.chunk(2, -1)
        return self._act(gate).mul_(up), ()

    def gradient(self, grad: Tensor, x: Tensor, *stats: Tensor) -> Tensor:
        out = torch.empty_like(x)
        if not self.gated:
            return self._act_gradient(grad, x, out)
        gate, up = x.chunk(2, -1)
        out_gate, out_up = out.chunk(2, -1)
        torch.mul(grad, self._act(gate), out=out_up)
        self._act_gradient(torch.mul(grad, up, out=grad), gate, out_gate)
        return out

    def _act(self, x: Tensor) -> Tensor:
        if self.kind == "silu":
            return F.silu(x)
        if self.kind == "relu":
            return F.relu(x)
        return F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")

    def _act_gradient(self, grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
        backward = torch.ops.aten
        if self.kind == "silu":
            backward.silu_backward.grad_input(grad, x, grad_input=out)
        elif self.kind == "relu":
            backward.threshold_backward.grad_input(grad, x, 0, grad_input=out)
        else:
            how = "tanh" if self.kind == "gelu_tanh" else "none"
            backward.gelu_backward.grad_input(grad, x, approximate=how, grad_input=out)
        return out


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Elementwise) -> Tensor:
        y, stats = function.compute(x)
        ctx.function = function
        ctx.save_for_backward(x, *stats)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.function.gradient(grads[0].clone(), *ctx.saved_tensors), None


def apply(function: Elementwise, x: Tensor) -> Tensor:
    """Return y of an elementwise function by itself; keeps x for backward."""
    y: Tensor = _Apply.apply(x, function)  # type: ignore[no-untyped-call]
    return y
