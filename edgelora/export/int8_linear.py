"""Linear layers of a graph with 8 bits on both sides: for prompts, where arithmetic is the limit and not memory.

A layer's inputs are divided by each token's largest magnitude, so that one scale serves them all, and rounded to 8 bits; its
weights are rounded to 8 bits for each output. MatMulIntegerToFloat multiplies integers, four of them in one instruction where
the processor has VNNI: measured on two cores at 256 tokens, three to four times as fast as MatMulNBits, whose scales change
within a row. For one token, which reads each weight once, it would read twice the bytes.

W8A8 with a scale for each token and each output: Dettmers et al., arXiv 2208.07339, section 3.1 (vector-wise quantization).
Operators: ONNX Runtime's ContribOperators.md, MatMulIntegerToFloat; ONNX, QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgelora.export.graph import MICROSOFT, Array
from edgelora.export.linear import FAST_LEVEL, LinearLayers
from edgelora.quant.grid import QuantizedTensor, dequantize

STEPS = 127  # on each side of zero
LEAST = 1e-20  # scale of an output whose weights are all zero


@dataclass
class Int8Layers(LinearLayers):
    """As LinearLayers, for layers that multiply 8-bit activations anyway (accuracy level 4); the others stay as they are."""

    _rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)  # inputs that several layers read

    def can_pack(self, paths: Sequence[str]) -> bool:
        """Products side by side would only be taken apart again, which takes longer than two of them."""
        return len(paths) != 2 and (super().can_pack(paths) or all(self.is_int8(path) for path in paths))

    def is_int8(self, path: str) -> bool:
        return self.storage(path)[2] == FAST_LEVEL

    def _product(self, x: ir.Value, name: str, paths: Sequence[str]) -> ir.Value:
        if not self.is_int8(paths[0]):
            return super()._product(x, name, paths)
        g = self.graph
        if x not in self._rounded:
            self._rounded[x] = self._round(x, name)
        codes, sizes = self._rounded[x]
        weight, scales = self._weights(name, paths)
        inputs = [codes, weight, g.constant(1.0 / STEPS), scales, g.constant(STEPS + 1, np.uint8)]
        y = g.op("MatMulIntegerToFloat", inputs, f"{name}/MatMulIntegerToFloat", domain=MICROSOFT)
        y = g.op("Mul", [y, sizes], f"{name}/Mul")
        bias = self._bias(name, paths)
        return y if bias is None else g.op("Add", [y, bias], f"{name}/Add")

    def _round(self, x: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """Return x `[…, K]` as uint8 codes, and each token's largest magnitude `[…, 1]`.

        Where that is 0 codes are of 0 / 0: any at all, and 0 when they are multiplied by it.
        """
        g = self.graph
        sizes = g.op(
            "ReduceMax", [g.op("Abs", [x], f"{name}/Abs"), g.constant([-1], np.int64)], f"{name}/ReduceMax", keepdims=1
        )
        inputs = [g.op("Div", [x, sizes], f"{name}/Div"), g.constant(1.0 / STEPS), g.constant(STEPS + 1, np.uint8)]
        return g.op("QuantizeLinear", inputs, f"{name}/QuantizeLinear"), sizes

    def _weights(self, name: str, paths: Sequence[str]) -> tuple[ir.Value, ir.Value]:
        """Return the weights int8 [K, N] and their scales fp32 [N] of layers side by side."""
        shapes = [self.weights.shape(f"{path}.weight") for path in paths]
        shape = (shapes[0][1], sum(rows for rows, _ in shapes))

        def read(part: int) -> Array:
            return np.concatenate([per_output(self._quantized(path))[part] for path in paths], axis=-1)

        return (
            self.graph.lazy_weight(f"{name}.int8", shape, ir.DataType.INT8, lambda: read(0)),
            self.graph.weight(f"{name}.int8_scales", read(1)),
        )


def per_output(weight: QuantizedTensor) -> tuple[Array, Array]:
    """Return a layer's weights rounded to int8 [K, N], and the scale of each output, fp32 [N]."""
    values: Array = dequantize(weight).numpy()
    scales = np.maximum(np.abs(values).max(axis=1) / STEPS, LEAST).astype(np.float32)
    return np.rint(values / scales[:, None]).astype(np.int8).T, scales
