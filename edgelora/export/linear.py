"""Linear layers and embeddings of a graph, straight from a merged folder's codes and scales: nothing is rounded here.

A linear on the grid becomes one `MatMulNBits` (B uint8 `[N, blocks, bytes]`, scales fp32 `[N, blocks]`, no zero points),
and several that read the same input become one whose rows are theirs, one after the other. fp32 weights become `MatMul`.
The embedding is a row Gather of codes and scales, unpacked by standard operators, since `GatherBlockQuantized` has no
WebAssembly kernel; a tied head reads the same initializers. Source: ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch

from edgelora.export.adapters import Branches, add_branch
from edgelora.export.graph import MICROSOFT, Array, GraphBuilder
from edgelora.quant.grid import QuantizedTensor

FAST_LEVEL = 4  # accuracy_level of the kernels with int8 activations


class Weights(Protocol):
    """What a checkpoint offers: `quant/checkpoint.py`'s MergedCheckpoint, or anything that has these."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> torch.Tensor: ...

    def read_linear(self, path: str) -> QuantizedTensor | torch.Tensor: ...


@dataclass
class LinearLayers:
    """Adds linear layers to `graph` and notes in `nodes` what each MatMulNBits holds, for the bundle's manifest.

    nodes: node name → {"rows": {path: [first, last + 1]}, "bits", "block_size", "accuracy_level"}
    """

    graph: GraphBuilder
    weights: Weights
    accuracy_levels: Mapping[str, int] = field(default_factory=dict)  # path → level, where it is not FAST_LEVEL
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    branches: Branches | None = None  # adapters beside the weights
    _grids: dict[str, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def storage(self, path: str) -> tuple[int, int, int]:
        """Return (bits, block size, accuracy level) of a layer; (32, 0, 0) for fp32."""
        weight = self.weights.read_linear(path)
        if not isinstance(weight, QuantizedTensor):
            return 32, 0, 0
        return weight.bits, weight.block_size, self.accuracy_levels.get(path, FAST_LEVEL)

    def can_pack(self, paths: Sequence[str]) -> bool:
        return len({self.storage(path) for path in paths}) == 1

    def linear(self, x: ir.Value, *paths: str) -> ir.Value:
        """Return x `[…, K]` through the layers at `paths`, their outputs side by side on the last axis."""
        name = joined(paths)
        y = self._product(x, name, paths)
        if self.branches is None:
            return y
        bounds = np.cumsum([0, *(self.weights.shape(f"{path}.weight")[0] for path in paths)]).tolist()
        rows = {path: [start, stop] for path, start, stop in zip(paths, bounds, bounds[1:], strict=False)}
        return add_branch(self.graph, self.branches, name, x, y, self.weights.shape(f"{paths[0]}.weight")[1], rows)

    def _product(self, x: ir.Value, name: str, paths: Sequence[str]) -> ir.Value:
        bits, block_size, level = self.storage(paths[0])
        bias = self._bias(name, paths)
        if bits == 32:
            return self._float(x, name, paths, bias)
        codes, scales = self._grid(name, paths)
        parts = [self.weights.shape(f"{path}.weight")[0] for path in paths]
        num_inputs = self._num_inputs(paths[0])
        y = self._matmul_nbits(x, name, codes, scales, bias, (sum(parts), num_inputs, bits, block_size, level))
        bounds = np.cumsum([0, *parts]).tolist()
        rows = {path: [start, stop] for path, start, stop in zip(paths, bounds, bounds[1:], strict=False)}
        self.nodes[str(y.producer().name)] = {  # type: ignore[union-attr]
            "rows": rows, "bits": bits, "block_size": block_size, "accuracy_level": level,
        }  # fmt: skip
        return y

    def _matmul_nbits(
        self,
        x: ir.Value,
        name: str,
        codes: ir.Value,
        scales: ir.Value,
        bias: ir.Value | None,
        shape: tuple[int, int, int, int, int],
    ) -> ir.Value:
        num_outputs, num_inputs, bits, block_size, level = shape
        inputs = [x, codes, scales] + ([None, None, bias] if bias is not None else [])
        return self.graph.op(
            "MatMulNBits", inputs, f"{name}/MatMulNBits", domain=MICROSOFT,
            N=num_outputs, K=num_inputs, bits=bits, block_size=block_size, accuracy_level=level,
        )  # fmt: skip

    def _float(self, x: ir.Value, name: str, paths: Sequence[str], bias: ir.Value | None) -> ir.Value:
        shapes = [self.weights.shape(f"{path}.weight") for path in paths]
        shape = (shapes[0][1], sum(rows for rows, _ in shapes))

        def read() -> Array:
            return np.concatenate([_array(self.weights.read_linear(path)) for path in paths]).T

        if self._is_shared(paths):  # a tied head: the embedding's own table, not a turned copy
            y = self.graph.op("FusedMatMul", [x, self._float_table(paths[0])], f"{name}/MatMul", domain=MICROSOFT, transB=1)
        else:
            y = self.graph.op(
                "MatMul", [x, self.graph.lazy_weight(f"{name}.weight", shape, ir.DataType.FLOAT, read)], f"{name}/MatMul"
            )
        return y if bias is None else self.graph.op("Add", [y, bias], f"{name}/Add")

    def embedding(self, ids: ir.Value, path: str) -> ir.Value:
        """Return fp32 `[batch, sequence, H]`: the rows of the table at `path` that `ids` int64 names."""
        bits, block_size, _ = self.storage(path)
        if bits == 32:
            return self.graph.op("Gather", [self._float_table(path), ids], f"{path}/Gather")
        g = self.graph
        codes, scales = self._grid(path, [path])
        hidden = self._num_inputs(path)
        rows = g.op("Gather", [codes, ids], f"{path}/Gather")
        row_scales = g.op("Gather", [scales, ids], f"{path}/scales")
        if bits == 4:
            low = g.op("BitwiseAnd", [rows, g.constant(15, np.uint8)], f"{path}/low")
            high = g.op("BitShift", [rows, g.constant(4, np.uint8)], f"{path}/high", direction="RIGHT")
            pair = [g.op("Unsqueeze", [part, g.constant([-1], np.int64)], f"{path}/pair") for part in (low, high)]
            flat = g.op("Concat", pair, f"{path}/Concat", axis=-1)
            rows = g.op("Reshape", [flat, g.constant([0, 0, -1, block_size], np.int64)], f"{path}/blocks")
        values = g.op("Cast", [rows], f"{path}/Cast", to=ir.DataType.FLOAT)
        values = g.op("Sub", [values, g.constant(float(2 ** (bits - 1)))], f"{path}/Sub")
        last = g.op("Unsqueeze", [row_scales, g.constant([-1], np.int64)], f"{path}/Unsqueeze")
        values = g.op("Mul", [values, last], f"{path}/Mul")
        padded = -(-hidden // block_size) * block_size
        x = g.op("Reshape", [values, g.constant([0, 0, padded], np.int64)], f"{path}/Reshape")
        if padded == hidden:
            return x
        ends = [g.constant([n], np.int64) for n in (0, hidden, -1)]
        return g.op("Slice", [x, *ends], f"{path}/Slice")

    def _grid(self, name: str, paths: Sequence[str]) -> tuple[ir.Value, ir.Value]:
        """Return the codes and scales of the layers, stacked by rows; a table that is asked for twice is one initializer."""
        if name not in self._grids:
            first = self._quantized(paths[0])
            rows = sum(self.weights.shape(f"{path}.weight")[0] for path in paths)

            def read(part: str) -> Array:
                return np.concatenate([getattr(self._quantized(path), part).numpy() for path in paths])

            self._grids[name] = (
                self.graph.lazy_weight(
                    f"{name}.codes", (rows, *first.codes.shape[1:]), ir.DataType.UINT8, lambda: read("codes")
                ),
                self.graph.lazy_weight(
                    f"{name}.scales", (rows, first.scales.shape[1]), ir.DataType.FLOAT, lambda: read("scales")
                ),
            )
        return self._grids[name]

    def _float_table(self, path: str) -> ir.Value:
        name = f"{path}.weight"
        found = self.graph.graph.initializers.get(name)
        if found is not None:
            return found
        shape = self.weights.shape(name)
        return self.graph.lazy_weight(name, shape, ir.DataType.FLOAT, lambda: _array(self.weights.read_linear(path)))

    def _is_shared(self, paths: Sequence[str]) -> bool:
        return len(paths) == 1 and f"{paths[0]}.weight" in self.graph.graph.initializers

    def _bias(self, name: str, paths: Sequence[str]) -> ir.Value | None:
        """Return the biases side by side, zeros for a layer that has none; None if no layer has one."""
        names = set(self.weights.names())
        if not any(f"{path}.bias" in names for path in paths):
            return None
        parts = []
        for path in paths:
            size = self.weights.shape(f"{path}.weight")[0]
            bias = f"{path}.bias"
            parts.append(self.weights.read(bias).float().numpy() if bias in names else np.zeros(size, np.float32))
        return self.graph.weight(f"{name}.bias", np.concatenate(parts))

    def _quantized(self, path: str) -> QuantizedTensor:
        weight = self.weights.read_linear(path)
        assert isinstance(weight, QuantizedTensor), f"{path} is not quantized"
        return weight

    def _num_inputs(self, path: str) -> int:
        return self._quantized(path).num_inputs


def joined(paths: Sequence[str]) -> str:
    """Return "model.layers.0.self_attn.q_proj+k_proj+v_proj" for the paths of three layers."""
    return "+".join([paths[0], *(path.rpartition(".")[2] for path in paths[1:])])


def _array(weight: QuantizedTensor | torch.Tensor) -> Array:
    assert isinstance(weight, torch.Tensor)
    array: Array = weight.float().numpy()
    return array
