"""Norms and activations with frozen parameters and few temporaries: each saves its input only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * w over the last dimension (arXiv 1910.07467, eq. 4); saves x and 1 / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        y: Tensor = (x * inverse).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        grad = grads[0] * weight
        along = (grad * x).mean(-1, keepdim=True).mul_(inverse).mul_(inverse)
        return grad.addcmul_(x, along, value=-1).mul_(inverse), None, None


class FrozenNorm(nn.Module):
    """RMSNorm, or LayerNorm with a bias, over the last dimension; `weight` includes the family's offset."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, path: str, kind: str, eps: float, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.path, self.kind, self.eps = path, kind, eps
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _activation_gradient(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        gradient: Tensor = torch.ops.aten.silu_backward(grad, x)
    elif kind == "relu":
        gradient = torch.ops.aten.threshold_backward(grad, x, 0)
    else:
        gradient = torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if kind == "gelu_tanh" else "none")
    return gradient


class _Gated(torch.autograd.Function):
    """act(gate) * up; saves the two inputs and computes the activation again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _activate(gate, kind).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        active = _activate(gate, ctx.kind).mul_(grads[0])
        return _activation_gradient(grads[0] * up, gate, ctx.kind), active, None


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Return act(gate) * up (GLU variants, arXiv 2002.05202)."""
    y: Tensor = _Gated.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    return y


def activate(x: Tensor, kind: str) -> Tensor:
    return _activate(x, kind)
