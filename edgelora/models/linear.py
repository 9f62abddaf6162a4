"""Frozen layers: weights kept in 32, 16, 8 or 4 bits and unpacked one layer at a time into a reused buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelora.errors import ModelError
from edgelora.models import gemm
from edgelora.quant.grid import QuantizedTensor, dequantize, quantize

_scratch = torch.empty(0)


def scratch(num_elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the process's one buffer, grown to at least `num_elements` of a dtype. Its content lives until the next call."""
    global _scratch
    size = -(-num_elements * dtype.itemsize // _scratch.itemsize)
    if _scratch.numel() < size:
        with torch.inference_mode(False):  # a merge may ask first: what it gets in inference mode, training may not write
            _scratch = torch.empty(size)
    return _scratch.view(dtype)


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

    @property
    def row_elements(self) -> int:
        """The elements that a row takes while it is unpacked: K, or on the grid whole blocks."""
        if isinstance(self.data, QuantizedTensor):
            return self.data.scales.shape[1] * self.data.block_size
        return self.shape[1]

    def rows(self, ids: Tensor) -> Tensor:
        """Return fp32 `[*ids.shape, K]`."""
        if isinstance(self.data, QuantizedTensor):
            flat = ids.reshape(-1)
            part = QuantizedTensor(self.data.codes[flat], self.data.scales[flat], *self._grid())
            return dequantize(part).reshape(*ids.shape, self.shape[1])
        return F.embedding(ids, self.data).float()

    def tile(self, start: int, stop: int) -> Tensor:
        """Return fp32 rows `[stop - start, K]`, in the scratch buffer unless stored in 32 bits."""
        part = part_of(self.data, start, stop)
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


def part_of(data: Tensor | QuantizedTensor, start: int, stop: int) -> Tensor | QuantizedTensor:
    """Return some rows of a weight, without a copy."""
    if isinstance(data, Tensor):
        return data[start:stop]
    return QuantizedTensor(data.codes[start:stop], data.scales[start:stop], data.bits, data.block_size, data.num_inputs)


def write(data: Tensor | QuantizedTensor, rows: Tensor) -> None:
    """Write a weight to the first K columns of `rows`, fp32 or bf16 `[N, at least K]`, contiguous."""
    if isinstance(data, QuantizedTensor) and data.scales.shape[1] * data.block_size == rows.shape[1]:
        dequantize(data, rows)  # no copy: its whole blocks are the rows
    else:
        rows[:, : data.shape[1]].copy_(dequantize(data) if isinstance(data, QuantizedTensor) else data)


def joined(parts: Sequence[Tensor | QuantizedTensor]) -> Tensor | QuantizedTensor | None:
    """Return the weights `[N_i, K]` as one `[sum N_i, K]` without a copy, where they lie one after the other in memory."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return _joined(tensors)
    grids = [part for part in parts if isinstance(part, QuantizedTensor)]
    if len(grids) < len(parts) or len({(grid.bits, grid.block_size) for grid in grids}) > 1:
        return None
    codes, scales = _joined([grid.codes for grid in grids]), _joined([grid.scales for grid in grids])
    if codes is None or scales is None:
        return None
    return QuantizedTensor(codes, scales, grids[0].bits, grids[0].block_size, grids[0].num_inputs)


def _joined(tensors: Sequence[Tensor]) -> Tensor | None:
    first = tensors[0]
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == storage and tensor.dtype == first.dtype
        if not (same and tensor.is_contiguous() and tensor.storage_offset() == offset and tensor.shape[1:] == first.shape[1:]):
            return None
        offset += tensor.numel()
    return first.as_strided((sum(tensor.shape[0] for tensor in tensors), *first.shape[1:]), first.stride())


class _Product(torch.autograd.Function):
    """x `[T, K]` times a frozen weight `[N, K]`: nothing is saved; backward unpacks the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        return gemm.product(x, weight.in_scratch())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gemm.product(grads[0], ctx.weight.in_scratch().t()), None


class FrozenLinear(nn.Module):
    """y = x Wᵀ + b with W `[out_features, in_features]` frozen. `path` is the checkpoint's module path."""

    bias: Tensor | None

    input_block = 0  # an input is taken as it is

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

    def in_scratch(self) -> Tensor:
        """Return fp32 `[N, K]`, unpacked into the one scratch buffer unless stored in 32 bits."""
        return self.weight.in_scratch()

    def forward(self, x: Tensor) -> Tensor:
        flat_TK = x.reshape(-1, x.shape[-1])
        y: Tensor = _Product.apply(flat_TK, self.weight)  # type: ignore[no-untyped-call]
        y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], -1)

    @property
    def frozen(self) -> FrozenLinear:
        """The frozen layer, of an adapter or, as here, the layer itself (linear_group.Member)."""
        return self

    @property
    def in_weight_space(self) -> bool:
        """Not where a hook changes or listens to the layer's input: in a group the layer is not called."""
        return not self._forward_pre_hooks

    @property
    def apart(self) -> bool:
        return True

    def trained(self) -> None:
        """Return the parameters of its adapter: there is none."""

    def weight_data(self) -> Tensor | QuantizedTensor:
        """Return the weight `[N, K]` as it is stored."""
        return self.weight.data

    def scaled(self) -> None:
        """Return the trained block scales: there are none."""

    def scale_gradient(self, grad_TN: Tensor, h_TK: Tensor) -> Tensor:
        raise AssertionError("nothing is trained here")

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
