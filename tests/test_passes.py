"""Each graph edit on the smallest graph that it is for, and on one that it must leave alone; results equal in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgelora.export.graph import Dims, GraphBuilder
from edgelora.export.passes import PASSES, apply
from edgelora.export.passes.inverse_reshapes import drop_inverse_reshapes
from edgelora.export.passes.metadata import drop_metadata
from edgelora.export.passes.named_axes import name_axes
from edgelora.export.passes.skip_layer_norm import fuse_skip_layer_norms
from edgelora.export.passes.unused import drop_unused
from tests.tolerances import SKIP_LAYER_NORM

FLOAT = ir.DataType.FLOAT
SHAPE = ("batch", "sequence", 8)
X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, **feeds: Any) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray[Any, Any]] = session.run(None, feeds)
    return outputs


def shaped(value: ir.Value, shape: Dims) -> ir.Value:
    value.shape, value.type = ir.Shape(shape), ir.TensorType(FLOAT)
    return value


def reshapes(last: Dims) -> ir.Model:
    g = GraphBuilder("reshapes")
    x = g.input("x", FLOAT, SHAPE)
    heads = shaped(g.op("Reshape", [x, g.constant([0, 0, 2, 4])], "heads"), ("batch", "sequence", 2, 4))
    size = [0, 0, -1] if len(last) == 3 else [0, -1]
    joined = shaped(g.op("Reshape", [heads, g.constant(size)], "joined"), last)
    g.output(g.op("Neg", [joined], "negative"), "y", FLOAT, last)
    return g.model()


def test_reshapes_that_undo_each_other_go() -> None:
    model = reshapes(SHAPE)
    before = run(model, x=X)
    model, modified = drop_inverse_reshapes(model)
    model, _ = drop_unused(model)
    assert modified
    assert kinds(model) == ["Neg"]
    assert np.array_equal(run(model, x=X)[0], before[0])


@pytest.mark.parametrize("last", [("batch", "other"), ("batch", "sequence", "unknown"), ("batch", "sequence", None)])
def test_reshapes_to_another_or_an_unknown_shape_stay(last: Dims) -> None:
    model, modified = drop_inverse_reshapes(reshapes(last))
    assert not modified
    assert kinds(model) == ["Reshape", "Reshape", "Neg"]


def norm(*, skip_shape: Dims = SHAPE, reads_sum: bool = False, axis: int = -1) -> ir.Model:
    g = GraphBuilder("norm")
    x, skip = g.input("x", FLOAT, SHAPE), g.input("skip", FLOAT, skip_shape)
    total = shaped(g.op("Add", [x, skip], "total"), SHAPE)
    weight, bias = (g.constant(np.linspace(low, 2, 8), np.float32) for low in (1, -1))
    y = shaped(g.op("LayerNormalization", [total, weight, bias], "norm", axis=axis, epsilon=1e-12), SHAPE)
    g.output(y, "y", FLOAT, SHAPE)
    if reads_sum:
        g.output(g.op("Neg", [total], "negative"), "z", FLOAT, SHAPE)
    return g.model()


@pytest.mark.parametrize("reads_sum", [False, True])
def test_sum_and_norm_become_one_node(reads_sum: bool) -> None:
    model = norm(reads_sum=reads_sum)
    before = run(model, x=X, skip=X[::-1].copy())
    model, modified = fuse_skip_layer_norms(model)
    assert modified
    assert kinds(model) == ["SkipLayerNormalization", "Neg"][: 2 if reads_sum else 1]
    for now, then in zip(run(model, x=X, skip=X[::-1].copy()), before, strict=True):
        np.testing.assert_allclose(now, then, **SKIP_LAYER_NORM)


@pytest.mark.parametrize("model", [norm(skip_shape=(1, "sequence", 8)), norm(axis=1)])
def test_a_sum_that_broadcasts_or_another_axis_stays(model: ir.Model) -> None:
    model, modified = fuse_skip_layer_norms(model)
    assert not modified
    assert kinds(model) == ["Add", "LayerNormalization"]


def test_nodes_and_weights_that_nobody_reads_go() -> None:
    g = GraphBuilder("unused")
    x = g.input("x", FLOAT, SHAPE)
    g.op("Add", [x, g.weight("unread", np.ones(8, np.float32))], "unread_sum")
    g.output(g.op("Neg", [x], "negative"), "y", FLOAT, SHAPE)
    model, modified = drop_unused(g.model())
    assert modified
    assert kinds(model) == ["Neg"]
    assert not model.graph.initializers
    assert drop_unused(model)[1] is False


def test_notes_of_the_tracer_go() -> None:
    model = norm()
    node = model.graph[0]
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/somebody/edgelora/export/encoder.py"
    node.doc_string = "why"
    model, modified = drop_metadata(model)
    assert modified
    assert b"somebody" not in ir.to_proto(model).SerializeToString()
    assert drop_metadata(model)[1] is False


def test_axes_of_inputs_and_outputs_get_their_names() -> None:
    g = GraphBuilder("axes")
    x = g.input("x", FLOAT, ("s1", "s2"))
    middle = shaped(g.op("Neg", [x], "middle"), ("s1", "s2"))
    g.output(g.op("Neg", [middle], "last"), "y", FLOAT, ("s1", 5))
    model, _ = name_axes(g.model())
    assert model.graph.inputs[0].shape == ("batch_size", "sequence_length")
    assert model.graph.outputs[0].shape == ("batch_size", 5)
    assert middle.shape is None


def test_all_together_keep_what_a_graph_computes() -> None:
    g = GraphBuilder("all")
    ids = g.input("ids", FLOAT, ("s1", "s2"))
    row = g.op("ReduceSum", [ids, g.constant([1])], "row", keepdims=0)
    g.output(row, "y", FLOAT, ("s1",))
    model = g.model()
    before = run(model, ids=X[0])
    assert np.array_equal(run(apply(model), ids=X[0])[0], before[0])
    assert len(PASSES) == 5
