"""Frozen convolutions and batch norms, as transformers' vision classes have them, and convolutions with an adapter.

A convolution's weight `[N, C / groups, *kernel]` is seen as a matrix `[N, K]`, K = C / groups · kernel, and adapted in weight
space: y = conv(x, W + s·BA). That holds for grouped and depthwise ones too, merges exactly, and keeps x alone for backward.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GEOMETRY = ("stride", "padding", "dilation", "groups", "kernel_size", "in_channels", "out_channels")
"""What transformers' code asks a convolution for."""


class Adapted(Protocol):
    """What acts as a convolution's weight: `merge` returns W + s·BA as `[N, K]`, `scale` is s."""

    scale: float

    def merge(self) -> Tensor: ...


class FrozenConv(nn.Module):
    """A Conv1d or Conv2d whose weight is never trained. `path` is the checkpoint's module path."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, path: str, like: nn.Conv1d | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.path = path
        for name in GEOMETRY:
            setattr(self, name, getattr(like, name))
        self.dimensions = weight.ndim - 2
        self.register_buffer("weight", weight.float(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """K: the inputs of one output."""
        return self.weight[0].numel()

    @property
    def bits(self) -> int:
        return 32

    def weight_fp32(self) -> Tensor:
        """Return the weight itself as `[N, K]`, so do not write to it."""
        return self.weight.flatten(1)

    in_scratch = weight_fp32

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def adapted(self, x: Tensor, adapter: Adapted, a_RK: Tensor, b_NR: Tensor) -> Tensor:
        """Return conv(x, W + s·BA); a and b are the parameters of the adapter."""
        y: Tensor = _AdaptedConvolution.apply(x, a_RK, b_NR, self, adapter)  # type: ignore[no-untyped-call]
        return y

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        convolve: Any = (F.conv1d, F.conv2d)[self.dimensions - 1]
        y: Tensor = convolve(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return y

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and of the weight, those that are `wanted`."""
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self._padding(), self.dilation, False, [0] * self.dimensions, self.groups,
            [*wanted, False],
        )  # fmt: skip
        return dx, dw

    def _padding(self) -> list[int]:
        """Return the padding in numbers."""
        padding: Any = self.padding
        if padding == "same":
            return [missing // 2 for missing in _missing(self)]
        return [0] * self.dimensions if padding == "valid" else list(padding)

    def extra_repr(self) -> str:
        return f"{self.path}, {tuple(self.weight.shape)}, groups {self.groups}"


class _Frozen(torch.autograd.Function):
    """Nothing but the input's shape is kept: torch's own convolution keeps the input, though no weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: FrozenConv) -> Tensor:
        ctx.conv, ctx.shape = conv, x.shape
        return conv.compute(x, conv.weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        no_values = grads[0].new_empty(1).expand(ctx.shape)
        return ctx.conv.gradients(grads[0], no_values, ctx.conv.weight, (True, False))[0], None


class _AdaptedConvolution(torch.autograd.Function):
    """dA = s·Bᵀ dW, dB = s·dW Aᵀ, where dW `[N, K]` is the gradient of the weight; W + s·BA is put together again for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, conv: FrozenConv, adapter: Adapted) -> Tensor:
        ctx.conv, ctx.adapter = conv, adapter
        ctx.save_for_backward(x, a, b)
        return conv.compute(x, adapter.merge().view_as(conv.weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, a, b = ctx.saved_tensors
        conv, adapter = ctx.conv, ctx.adapter
        weight = adapter.merge().view_as(conv.weight)
        dx, dw = conv.gradients(grads[0], x, weight, (ctx.needs_input_grad[0], True))
        dw_NK = dw.flatten(1)
        return dx, adapter.scale * (b.t() @ dw_NK), adapter.scale * (dw_NK @ a.t()), None, None


class FrozenBatchNorm(nn.Module):
    """Batch norm with the statistics of its checkpoint, in training too: y = x · scale + shift, of which nothing is kept."""

    scale: Tensor
    shift: Tensor

    def __init__(self, like: nn.modules.batchnorm._BatchNorm, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        mean, variance = tensors["running_mean"].float(), tensors["running_var"].float()
        scale = torch.rsqrt(variance + like.eps)
        scale = scale * tensors["weight"].float() if "weight" in tensors else scale
        shift = -mean * scale
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift + tensors["bias"].float() if "bias" in tensors else shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x * self.scale.view(shape)).add_(self.shift.view(shape))


def can_freeze(module: nn.Module) -> bool:
    """Tell whether a module is a convolution that FrozenConv computes: one that computes as torch's own, without weights of
    another form, padded with zeros by as many before as after."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or hasattr(module, "parametrizations"):
        return False
    own = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward) and not module._forward_pre_hooks
    even = module.padding != "same" or not any(missing % 2 for missing in _missing(module))
    return own and even and module.padding_mode == "zeros"


def _missing(conv: Any) -> list[int]:
    """Return the outputs that a convolution without padding has less than inputs, for each dimension."""
    return [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
