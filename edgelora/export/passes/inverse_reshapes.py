"""x → Reshape → Reshape → y, where y has x's shape, is x: heads that were split off and put together again."""

from __future__ import annotations

import onnx_ir as ir


def drop_inverse_reshapes(model: ir.Model) -> tuple[ir.Model, bool]:
    modified = False
    for node in model.graph:
        source = reshaped(node)
        start = reshaped(source.producer()) if source is not None else None
        if start is not None and same_shape(start, node.outputs[0]):
            node.outputs[0].replace_all_uses_with(start)
            modified = True
    return model, modified


def reshaped(node: ir.Node | None) -> ir.Value | None:
    """Return what a Reshape node reshapes, None for any other node."""
    return node.inputs[0] if node is not None and node.op_type == "Reshape" and node.domain == "" else None


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether both shapes are known and equal; named sizes are equal if their names are."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    pairs = zip(a.shape, b.shape, strict=True)
    return all(x == y and (isinstance(x, int) or x.value is not None) for x, y in pairs)
