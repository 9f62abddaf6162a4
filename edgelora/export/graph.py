"""A thin typed layer over onnx_ir: values, nodes and weights of one ONNX graph.

Weights are lazy: a function is called when its tensor is written, so that building and saving a graph never holds more
than one of them in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

# Old enough for onnxruntime 1.20 and every onnxruntime-web of the last two years; BitwiseAnd needs 18.
OPSET = 18
IR_VERSION = 9
MICROSOFT = "com.microsoft"
EXTERNAL_BYTES = 1024  # smaller weights stay inside the .onnx file: shape inference wants to see constants

Array = np.ndarray[Any, np.dtype[Any]]
Dims = Sequence[int | str]


class GraphBuilder:
    """Collects the inputs, outputs, weights and nodes of a graph, in the order in which they are made."""

    def __init__(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET, MICROSOFT: 1})
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._taken: dict[str, int] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Dims, default: Array | None = None) -> ir.Value:
        """Add a graph input; with a `default` it is an overridable initializer, which loaders may ignore."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        if default is not None:
            value.const_value = ir.tensor(default, name=name)
            self.graph.register_initializer(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Dims) -> None:
        """Make `value` an output of the graph, called `name`."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.graph.outputs.append(value)

    def constant(self, values: Array | Sequence[int] | float, dtype: Any = None) -> ir.Value:
        """Return a small constant; equal ones are one initializer."""
        array: Array = np.asarray(values, dtype=dtype or (np.float32 if isinstance(values, float) else np.int64))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            text = "x".join(map(str, array.ravel()[:4].tolist())) or "empty"
            self._constants[key] = self.weight(self._unique(f"constants/{array.dtype.name}/{text}"), array)
        return self._constants[key]

    def weight(self, name: str, array: Array) -> ir.Value:
        """Add an initializer that is in memory (or mapped) already."""
        return self._register(name, ir.tensor(np.asarray(array, order="C"), name=name))

    def lazy_weight(self, name: str, shape: Sequence[int], dtype: ir.DataType, read: Callable[[], Array]) -> ir.Value:
        """Add an initializer whose content `read()` gives when the model is saved."""

        def tensor() -> ir.TensorProtocol:
            array = np.ascontiguousarray(read())
            assert array.shape == tuple(shape), f"{name}: {array.shape} instead of {tuple(shape)}"
            return ir.Tensor(array, name=name)

        return self._register(name, ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=name))

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node with one output."""
        return self.ops(op_type, inputs, name, 1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, count: int, *, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """Add a node with several outputs; those that nobody reads are dropped by `model`."""
        name = self._unique(name)
        node = ir.Node(
            domain, op_type, list(inputs), ir.convenience.convert_attributes(attributes), num_outputs=count, name=name
        )
        for index, value in enumerate(node.outputs):
            value.name = name if index == 0 else f"{name}:{index}"
        self.graph.append(node)
        return list(node.outputs)

    def model(self, metadata: dict[str, str] | None = None) -> ir.Model:
        """Return the finished model; optional outputs without a reader lose their name, so that kernels skip them."""
        outputs = set(self.graph.outputs)
        for node in self.graph:
            for value in node.outputs[1:]:  # the first one is never optional
                if not value.uses() and value not in outputs:
                    value.name = ""
        return ir.Model(self.graph, ir_version=IR_VERSION, producer_name="edgelora", metadata_props=metadata)

    def _register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _unique(self, name: str) -> str:
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return name if count == 0 else f"{name}_{count}"


def save(model: ir.Model, path: Path) -> None:
    """Write `path` and, beside it, `<name>_data` with the weights: one tensor in memory at a time."""
    ir.save(
        model,
        path,
        external_data=f"{path.name}_data",
        size_threshold_bytes=EXTERNAL_BYTES,
        max_workers=1,
        max_in_flight_bytes=1,
    )
