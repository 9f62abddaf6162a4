"""Drop what the tracer notes on every node: Python stack traces with this machine's paths, module names, doc strings."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir


def drop_metadata(model: ir.Model) -> tuple[ir.Model, bool]:
    noted: list[Any] = [model, model.graph, *model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        noted += [node, *node.outputs]
    modified = False
    for thing in noted:
        modified |= bool(thing.metadata_props)
        thing.metadata_props.clear()
    for thing in (model, model.graph, *model.graph):
        modified |= thing.doc_string is not None
        thing.doc_string = None
    model.producer_name, model.producer_version = "edgelora", None
    return model, modified
