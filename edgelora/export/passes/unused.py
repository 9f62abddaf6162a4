"""Drop what nobody reads: nodes, initializers, functions."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass


def drop_unused(model: ir.Model) -> tuple[ir.Model, bool]:
    modified = False
    passes: tuple[Any, ...] = (RemoveUnusedNodesPass, RemoveUnusedFunctionsPass)
    for cleanup in passes:
        result = cleanup()(model)
        model, modified = result.model, modified or result.modified
    return model, modified
