"""What `inspect` says of each kind of folder, and that it flags a bundle that was spoiled by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from edgelora.adapters.lora import Factors
from edgelora.export.export import export
from edgelora.inspect import inspect, look_at_factors
from edgelora.merging.merge import merge

NODE = "model.layers.0.self_attn.o_proj/MatMulNBits"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_decoder(tmp_path_factory.mktemp("model") / "llama", "llama", hidden_size=64, head_dim=16)


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    export(str(model), out)
    return out


def test_a_bundle(bundle: Path) -> None:
    found = inspect(bundle)
    assert found["summary"] == f"all {len(found['nodes'])} MatMulNBits nodes are on a fast kernel"
    assert len(found["nodes"]) >= 9
    assert found["misses"] == found["damage"] == []
    assert {row["block_size"] for row in found["nodes"]} == {32}
    assert all(row["fast"] and row["accuracy_level"] == 4 for row in found["nodes"])


def float_zero_points(graph: Any, node: Any) -> None:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.full((64, 2), 8, np.float32), "zeros"))
    node.input.append("zeros")


def computed_weight(graph: Any, node: Any) -> None:
    from onnx import helper

    graph.node.insert(0, helper.make_node("Identity", [node.input[1]], ["computed"]))
    node.input[1] = "computed"


def fed_weight(graph: Any, node: Any) -> None:
    from onnx import TensorProto, helper

    graph.input.append(helper.make_tensor_value_info(node.input[1], TensorProto.UINT8, [64, 2, 16]))


def unnamed_level(graph: Any, node: Any) -> None:
    next(attribute for attribute in node.attribute if attribute.name == "accuracy_level").i = 0


def group_index(graph: Any, node: Any) -> None:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.zeros(64, np.int32), "groups"))
    node.input.extend(["", "groups"])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (float_zero_points, "zero points are float, not constant packed uint8"),
        (computed_weight, "B is not a constant uint8 tensor"),
        (fed_weight, "B is not a constant uint8 tensor"),
        (unnamed_level, "accuracy_level 0, which the manifest does not name as an exception"),
        (group_index, "it has a g_idx"),
    ],
)
def test_a_bundle_spoiled_by_hand(bundle: Path, tmp_path: Path, spoil: Callable[[Any, Any], None], reason: str) -> None:
    import onnx

    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    path = copy / "onnx" / "model_q4.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.name == NODE)
    bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
    spoil(model.graph, node)
    onnx.save(model, path)
    found = inspect(copy)
    wanted = (
        "accuracy_level 0 with 8 bits, which have a kernel at level 4 only" if spoil is unnamed_level and bits == 8 else reason
    )
    assert found["misses"] == [{"node": NODE, "reason": wanted}]
    assert found["summary"] == f"1 of {len(found['nodes'])} nodes miss a fast kernel"
    assert found["damage"] == ["onnx/model_q4.onnx: changed"]


def test_a_float_weight_in_a_quantized_bundle(bundle: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import helper, numpy_helper

    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    path = copy / "onnx" / "model_q4.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((64, 64), np.float32), "float_weight"))
    model.graph.node.append(helper.make_node("MatMul", ["anything", "float_weight"], ["product"], name="late"))
    onnx.save(model, path)
    assert inspect(copy)["misses"] == [{"node": "late", "reason": "MatMul with a float weight of [64, 64]"}]


def test_a_merged_folder(model: Path, tmp_path: Path) -> None:
    merge(None, tmp_path / "merged", model=str(model), precision="int4")
    found = inspect(tmp_path / "merged")
    row = next(row for row in found["layers"] if row["layer"] == "model.embed_tokens")
    assert (row["bits"], row["shape"], row["bytes"]) == (8, [tiny.VOCAB, 64], tiny.VOCAB * (64 + 2 * 4))
    assert sum(found["bits"].values()) == len(found["layers"]) == 16


def test_a_model(model: Path) -> None:
    found = inspect(model)
    assert (found["kind"], found["model_type"]) == ("model", "llama")
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert sum(row["count"] for row in found["tensors"]) == len(tensors)


def test_singular_values_of_an_update() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 20, generator=generator), torch.randn(12, 3, generator=generator)
    found = look_at_factors(Factors(a, b, scale=2.0))
    wanted = torch.linalg.svdvals(2.0 * b @ a)[:3]
    np.testing.assert_allclose(found["singular_values"], wanted, rtol=1e-3)
    assert found["norm"] == pytest.approx(float((2.0 * b @ a).norm()), rel=1e-3)
    assert (found["rank"], found["parameters"]) == (3, 96)
