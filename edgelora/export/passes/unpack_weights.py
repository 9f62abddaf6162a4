"""MatMulNBits → a product with its weight unpacked by standard operators, which ONNX Runtime folds once, as it loads the file.

For WebAssembly, whose MatMulNBits unpacks the whole weight anew for every product: a token of SmolLM2 took ten times as
long there. The codes and scales in the file stay as they are; in memory each weight takes 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgelora.export.graph import Array

DOMAIN = "com.microsoft"
UNPACKED_BYTES = 1 << 30  # of fp32 weights at most: WebAssembly addresses 4 GB, and folding needs some of it twice


def unpacked_bytes(model: ir.Model) -> int:
    """Return the size of all MatMulNBits weights in fp32."""
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    return sum(4 * node.attributes["N"].as_int() * node.attributes["K"].as_int() for node in nodes)


def unpack_weights(model: ir.Model) -> tuple[ir.Model, bool]:
    """Replace every MatMulNBits; the product keeps its node's name."""
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits" and node.domain == DOMAIN]
    constants: dict[str, ir.Value] = {}
    for node in nodes:
        replace(model.graph, node, constants)
    if nodes:
        model.graph.opset_imports.setdefault(DOMAIN, 1)
    return model, bool(nodes)


def replace(graph: ir.Graph, node: ir.Node, constants: dict[str, ir.Value]) -> None:
    x, codes, scales = node.inputs[:3]
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    bits, block_size = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    outputs, inputs = node.attributes["N"].as_int(), node.attributes["K"].as_int()
    new = Chain(graph, node, constants)
    rows = codes
    if bits < 8:
        parts = [new.code(codes, shift, bits) for shift in range(0, 8, bits)]
        last = new.constant(np.array([-1], np.int64))
        rows = new.op("Concat", [new.op("Unsqueeze", [part, last]) for part in parts], axis=-1)  # the lowest bits come first
    blocks = math.ceil(inputs / block_size)
    rows = new.op("Reshape", [rows, new.constant(np.array([outputs, blocks, block_size], np.int64))])
    values = new.op("Cast", [rows], to=ir.DataType.FLOAT)
    values = new.op("Sub", [values, new.constant(np.array(2.0 ** (bits - 1), np.float32))])
    per_block = new.op("Reshape", [scales, new.constant(np.array([outputs, blocks, 1], np.int64))])
    values = new.op("Mul", [values, per_block])
    weight = new.op("Reshape", [values, new.constant(np.array([outputs, blocks * block_size], np.int64))])
    if blocks * block_size != inputs:
        ends = [new.constant(np.array([number], np.int64)) for number in (0, inputs, 1)]
        weight = new.op("Slice", [weight, *ends])
    y = new.op("FusedMatMul", [x, weight], domain=DOMAIN, transB=1)
    product = y.producer()
    if bias is not None:
        y = new.op("Add", [y, bias])
    old = node.outputs[0]
    y.name, y.type, y.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(y, replace_graph_outputs=True)
    old.name = None
    graph.remove(node, safe=True)
    assert product is not None
    product.name = node.name


class Chain:
    """Puts nodes before `node`, named after it, and constants into the graph, each of them once."""

    def __init__(self, graph: ir.Graph, node: ir.Node, constants: dict[str, ir.Value]) -> None:
        self.graph, self.node, self.constants = graph, node, constants
        self.count = 0

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], *, domain: str = "", **attributes: Any) -> ir.Value:
        self.count += 1
        name = f"{self.node.name}/{self.count}/{op_type}"
        made = ir.node(op_type, inputs, attributes, domain=domain, name=name)
        made.outputs[0].name = name
        self.graph.insert_before(self.node, made)
        return made.outputs[0]

    def code(self, codes: ir.Value | None, shift: int, bits: int) -> ir.Value | None:
        """Return the codes at one place of each byte."""
        part = codes
        if shift:
            part = self.op("BitShift", [part, self.constant(np.array(shift, np.uint8))], direction="RIGHT")
        if shift + bits < 8:
            part = self.op("BitwiseAnd", [part, self.constant(np.array(2**bits - 1, np.uint8))])
        return part

    def constant(self, array: Array) -> ir.Value:
        name = f"unpack/{array.dtype.name}/{'x'.join(map(str, array.ravel().tolist()))}/{array.ndim}"
        if name not in self.constants:
            value = ir.Value(
                name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape),
                const_value=ir.tensor(array, name=name),
            )  # fmt: skip
            self.graph.register_initializer(value)
            self.constants[name] = value
        return self.constants[name]
