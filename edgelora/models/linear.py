"""Frozen layers: weights kept in 32, 16, 8 or 4 bits and unpacked one layer at a time into a reused buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelora.errors import ModelError
from edgelora.quant.grid import QuantizedTensor, dequantize, quantize

_scratch = torch.empty(0)


def scratch(num_elements: int) -> Tensor:
    """Return the process's one fp32 buffer, grown to at least `num_elements`. Its content lives until the next call."""
    global _scratch
    if _scratch.numel() < num_elements:
        _scratch = torch.empty(num_elements)
    return _scratch


class FrozenWeight:
    """A weight `[N, K]` that is never trained: a fp32, bf16 or fp16 tensor (mapped from its file or not) or one on the grid."""

    def __init__(self, data: Tensor | QuantizedTensor) -> None:
        self.data = data

    @classmethod
    def store(cls, weight: Tensor | QuantizedTensor, bits: int, block_size: int) -> FrozenWeight:
        """Keep `weight` in `bits` (32, 16, 8, 4), without a copy where it has them already.

        A tensor on the grid stays as it is, whatever `bits`: it is what a merge chose. fp16 stays fp16 at 16 bits.
        """
        if isinstance(weight, QuantizedTensor):
            return cls(weight)
        if bits == 32:
            return cls(weight.float())
        if bits == 16:
            return cls(weight if weight.dtype in (torch.bfloat16, torch.float16) else weight.bfloat16())
        if bits in (8, 4):
            return cls(quantize(weight, bits, block_size))
        raise ModelError(f"weights cannot be kept in {bits} bits; allowed: 32, 16, 8, 4")

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    @property
    def bits(self) -> int:
        return self.data.bits if isinstance(self.data, QuantizedTensor) else 8 * self.data.element_size()

    @property
    def num_bytes(self) -> int:
        return self.data.num_bytes if isinstance(self.data, QuantizedTensor) else self.data.numel() * self.data.element_size()

    def fp32(self, out: Tensor | None = None) -> Tensor:
        """Return fp32 `[N, K]`: the stored tensor itself at 32 bits, else unpacked into `out` or new memory."""
        return unpacked(self.data, out)

    def rows(self, ids: Tensor) -> Tensor:
        """Return fp32 `[*ids.shape, K]`."""
        if isinstance(self.data, QuantizedTensor):
            flat = ids.reshape(-1)
            part = QuantizedTensor(self.data.codes[flat], self.data.scales[flat], *self._grid())
            return dequantize(part).reshape(*ids.shape, -1)
        return F.embedding(ids, self.data).float()

    def tile(self, start: int, stop: int) -> Tensor:
        """Return fp32 rows `[stop - start, K]`, in the scratch buffer unless stored in 32 bits."""
        if isinstance(self.data, QuantizedTensor):
            part: Tensor | QuantizedTensor = QuantizedTensor(
                self.data.codes[start:stop], self.data.scales[start:stop], *self._grid()
            )
        else:
            part = self.data[start:stop]
        return unpacked(part, scratch(_padded(part)))

    def in_scratch(self) -> Tensor:
        return self.tile(0, self.shape[0])

    def _grid(self) -> tuple[int, int, int]:
        assert isinstance(self.data, QuantizedTensor)
        return self.data.bits, self.data.block_size, self.data.num_inputs


def _padded(data: Tensor | QuantizedTensor) -> int:
    """Return the elements of the buffer that `data` unpacks into."""
    if isinstance(data, QuantizedTensor):
        return data.scales.numel() * data.block_size
    return 0 if data.dtype == torch.float32 else data.numel()


def unpacked(data: Tensor | QuantizedTensor, out: Tensor | None = None) -> Tensor:
    if isinstance(data, QuantizedTensor):
        return dequantize(data, out)
    if data.dtype == torch.float32:
        return data
    if out is None:
        return data.float()
    return out.view(-1)[: data.numel()].view(data.shape).copy_(data)


class _Product(torch.autograd.Function):
    """x `[..., K]` times a frozen weight `[N, K]`: nothing is saved; backward unpacks the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.in_scratch())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.weight.in_scratch(), None


class FrozenLinear(nn.Module):
    """y = x Wᵀ + b with W `[out_features, in_features]` frozen. `path` is the checkpoint's module path."""

    bias: Tensor | None

    def __init__(self, path: str, weight: FrozenWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.path = path
        self.weight = weight
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def from_weight(
        cls, path: str, weight: Tensor | QuantizedTensor, bias: Tensor | None, bits: int, block_size: int
    ) -> FrozenLinear:
        return cls(path, FrozenWeight.store(weight, bits, block_size), None if bias is None else bias.float())

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def bits(self) -> int:
        return self.weight.bits

    @property
    def quantized(self) -> QuantizedTensor | None:
        return self.weight.data if isinstance(self.weight.data, QuantizedTensor) else None

    def weight_fp32(self) -> Tensor:
        """Return fp32 `[N, K]`; at 32 bits the stored tensor itself, so do not write to it."""
        return self.weight.fp32()

    def forward(self, x: Tensor) -> Tensor:
        data = self.weight.data
        if isinstance(data, Tensor) and data.dtype == torch.float32:
            return F.linear(x, data, self.bias)
        y: Tensor = _Product.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y.add_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.path}, {self.in_features} → {self.out_features}, {self.bits} bits"


class FrozenEmbedding(nn.Module):
    """Rows of a frozen table `[V, H]`; the LM head may share its `weight`."""

    def __init__(self, path: str, weight: FrozenWeight) -> None:
        super().__init__()
        self.path = path
        self.weight = weight

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    @property
    def bits(self) -> int:
        return self.weight.bits

    def weight_fp32(self) -> Tensor:
        return self.weight.fp32()

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids)


def num_bytes(weights: Sequence[FrozenWeight]) -> int:
    """Return the bytes of distinct weights; a tied head counts once."""
    return sum(weight.num_bytes for weight in {id(w): w for w in weights}.values())
