"""Round a layer as it ships and measure what that did to the weight and to the adapter's update in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgelora.quant.grid import QuantizedTensor, dequantize, quantize

CHUNK_ELEMENTS = 1 << 21  # 8 MB of fp32: the rounding's own working memory, whatever the layer's size


@dataclass(frozen=True)
class Rounded:
    """A layer on the grid, with W the merged weight, Q(W) the rounded one and D = W - W0 the adapter's update.

    error: ‖Q(W) - W‖ / ‖W‖.  max_error: the largest |Q(W) - W|.
    delta: ‖D‖ / ‖W‖; None without an adapter, like the two that follow.
    delta_kept: ⟨Q(W) - Q(W0), D⟩ / ‖D‖², how much of the update survives the rounding: 1 is all of it, 0 nothing.
    delta_noise: ‖Q(W) - W‖ / ‖D‖, the rounding error in units of the update.
    """

    tensor: QuantizedTensor
    error: float
    max_error: float
    delta: float | None = None
    delta_kept: float | None = None
    delta_noise: float | None = None

    def figures(self) -> dict[str, float]:
        """Return the measured values that exist, to six significant digits."""
        names = ("error", "max_error", "delta", "delta_kept", "delta_noise")
        return {name: float(f"{value:.6g}") for name in names if (value := getattr(self, name)) is not None}


def round_layer(base_NK: Tensor, merged_NK: Tensor | None, bits: int, block_size: int) -> Rounded:
    """Round the merged weight (the base itself if None) to nearest and measure the error."""
    return measured(base_NK, merged_NK, quantize(base_NK if merged_NK is None else merged_NK, bits, block_size))


def measured(base_NK: Tensor, merged_NK: Tensor | None, tensor: QuantizedTensor) -> Rounded:
    """Measure what `tensor` makes of the merged weight (the base itself if None), a few rows at a time."""
    weight_NK = base_NK if merged_NK is None else merged_NK
    weight_2 = error_2 = delta_2 = moved = largest = 0.0
    for rows in row_chunks(*weight_NK.shape):
        weight = weight_NK[rows].float()
        part = QuantizedTensor(tensor.codes[rows], tensor.scales[rows], tensor.bits, tensor.block_size, tensor.num_inputs)
        shipped = dequantize(part)
        error = shipped - weight
        weight_2 += square(weight)
        error_2 += square(error)
        largest = max(largest, error.abs().max().item())
        if merged_NK is not None:
            base = base_NK[rows].float()
            delta = weight - base
            delta_2 += square(delta)
            moved += inner(shipped - dequantize(quantize(base, tensor.bits, tensor.block_size)), delta)
    relative = math.sqrt(error_2 / weight_2) if weight_2 else 0.0
    if not delta_2:
        return Rounded(tensor, relative, largest)
    delta_norm, kept = math.sqrt(delta_2), moved / delta_2
    return Rounded(tensor, relative, largest, delta_norm / math.sqrt(weight_2), kept, math.sqrt(error_2) / delta_norm)


def relative_error(weight_NK: Tensor, bits: int, block_size: int) -> float:
    """Return ‖Q(W) - W‖ / ‖W‖ without keeping the codes."""
    weight_2 = error_2 = 0.0
    for rows in row_chunks(*weight_NK.shape):
        weight = weight_NK[rows].float()
        weight_2 += square(weight)
        error_2 += square(dequantize(quantize(weight, bits, block_size)).sub_(weight))
    return math.sqrt(error_2 / weight_2) if weight_2 else 0.0


def row_chunks(num_outputs: int, num_inputs: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // num_inputs)
    for start in range(0, num_outputs, step):
        yield slice(start, start + step)


def square(tensor: Tensor) -> float:
    return inner(tensor, tensor)


def inner(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.reshape(-1), b.reshape(-1)).item()
