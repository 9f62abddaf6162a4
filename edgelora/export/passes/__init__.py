"""Graph edits for traced models: one per file, each `(model) -> (model, modified)`, applied in the order of `PASSES`."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from edgelora.export.passes.inverse_reshapes import drop_inverse_reshapes
from edgelora.export.passes.metadata import drop_metadata
from edgelora.export.passes.named_axes import name_axes
from edgelora.export.passes.skip_layer_norm import fuse_skip_layer_norms
from edgelora.export.passes.unused import drop_unused

Pass = Callable[[ir.Model], tuple[ir.Model, bool]]

PASSES: tuple[Pass, ...] = (drop_inverse_reshapes, fuse_skip_layer_norms, drop_unused, drop_metadata, name_axes)


def apply(model: ir.Model, passes: tuple[Pass, ...] = PASSES) -> ir.Model:
    for graph_edit in passes:
        model, _ = graph_edit(model)
    return model
