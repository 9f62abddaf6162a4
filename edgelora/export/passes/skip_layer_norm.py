"""Add + LayerNormalization → SkipLayerNormalization, one pass over memory instead of two (ONNX Runtime's ContribOperators.md).

The sum stays available as the operator's fourth output for whoever reads it besides (pre-norm encoders).
"""

from __future__ import annotations

import onnx_ir as ir

from edgelora.export.passes.inverse_reshapes import same_shape

DOMAIN = "com.microsoft"


def fuse_skip_layer_norms(model: ir.Model) -> tuple[ir.Model, bool]:
    modified = False
    for norm in list(model.graph):
        add = norm.inputs[0].producer() if is_last_axis_norm(norm) and norm.inputs[0] is not None else None
        if add is None or add.op_type != "Add" or add.domain != "":
            continue
        x, skip = add.inputs
        if x is None or skip is None or not same_shape(x, skip):
            continue
        fuse(model, add, norm)
        modified = True
    if modified:
        model.graph.opset_imports.setdefault(DOMAIN, 1)
    return model, modified


def is_last_axis_norm(node: ir.Node) -> bool:
    """Whether a node is LayerNormalization over the last of three axes, with weight and bias, as the fused kernel has it."""
    if node.op_type != "LayerNormalization" or node.domain != "" or len(node.inputs) != 3:
        return False
    x, axis = node.inputs[0], node.attributes.get_int("axis", -1)
    return x is not None and x.shape is not None and len(x.shape) == 3 and axis in (-1, 2)


def fuse(model: ir.Model, add: ir.Node, norm: ir.Node) -> None:
    total, normed = add.outputs[0], norm.outputs[0]
    others = [use for use in total.uses() if use.node is not norm] or total.is_graph_output()
    attributes = {"epsilon": norm.attributes.get_float("epsilon", 1e-5)}
    fused = ir.node(
        "SkipLayerNormalization", [*add.inputs, *norm.inputs[1:]], attributes, domain=DOMAIN, num_outputs=4 if others else 1,
        name=f"{norm.name}/skip",
    )  # fmt: skip
    model.graph.insert_before(norm, fused)
    replace(normed, fused.outputs[0])
    if others:
        for value in fused.outputs[1:3]:
            value.name = ""  # mean and variance, which nobody reads
        replace(total, fused.outputs[3])
    model.graph.remove(norm, safe=True)
    model.graph.remove(add, safe=True)


def replace(old: ir.Value, new: ir.Value) -> None:
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = None
