"""The ONNX graph of a network that is no decoder, traced from transformers' own class; its inputs and outputs are the task's.

Before tracing, linear layers become modules that emit one `MatMulNBits` with the merged folder's codes, and attention
becomes a function that emits one `MultiHeadAttention`: no pattern has to be found again in the traced graph. The passes in
`export/passes/` tidy what is left.
"""

from __future__ import annotations

import builtins
import inspect
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from edgelora.errors import ModelError
from edgelora.export.attention import ATTENTION, emit, register_attention
from edgelora.export.graph import save
from edgelora.export.passes import apply
from edgelora.models.build import build_network
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.grid import QuantizedTensor
from edgelora.tasks import get_task
from edgelora.tasks.base import GraphTensor

OPSET = 20  # the first with Gelu
FAST_LEVEL = 4  # MatMulNBits' accuracy_level with int8 activations
WRAPPER = "traced_model."  # what the wrapper module puts in front of every initializer's name


@dataclass(frozen=True)
class TracedGraph:
    """nodes: MatMulNBits node name → {"rows": {path: [first, last + 1]}, "bits", "block_size", "accuracy_level"}."""

    model: ir.Model
    nodes: dict[str, dict[str, Any]]

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(str(value.name) for value in self.model.graph.inputs)


def export_traced(checkpoint: MergedCheckpoint, path: Path, accuracy_levels: Mapping[str, int] | None = None) -> TracedGraph:
    """Write the graph to `path` and its weights beside it."""
    built = build_traced(checkpoint, accuracy_levels)
    save(built.model, path)
    return built


def build_traced(checkpoint: MergedCheckpoint, accuracy_levels: Mapping[str, int] | None = None) -> TracedGraph:
    """Return the graph of a merged folder; its weights are mapped from the folder, not copied.

    accuracy_levels: layer path → level, where it is not 4. Raises ModelError if torch cannot trace the model.
    """
    task = get_task(checkpoint.task)
    model = load_for_export(checkpoint, accuracy_levels or {})
    size = getattr(task.open_processor(checkpoint.folder), "output_size", None)
    wanted = task.inputs({"input_size": size, **checkpoint.config}, inspect.signature(model.forward).parameters)
    traced = Traced(model, [tensor.name for tensor in wanted], [output.name for output in task.outputs])
    graph = trace(traced, wanted, task.outputs)
    return TracedGraph(graph, matmul_nodes(graph))


def trace(
    module: nn.Module,
    wanted: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    sizes: Mapping[str, int] | None = None,
) -> ir.Model:
    """Return the graph of a module that takes tensors in the order of `wanted` and gives those of `outputs`.

    Its initializers are named as in `module.traced_model`. sizes: of the named axes, where they must fit together. Raises
    ModelError if torch cannot trace it.
    """
    axes = dict.fromkeys(size for tensor in wanted for size in tensor.shape if isinstance(size, str))
    least = {name: size for tensor in wanted for name, size in tensor.smallest.items()}
    sizes = sizes or {name: number + least.get(name, 2) for number, name in enumerate(axes)}
    dynamic = tuple({i: Dim.DYNAMIC for i, size in enumerate(tensor.shape) if isinstance(size, str)} for tensor in wanted)
    with quiet(), lengths_traced(module):
        try:
            program = torch.onnx.export(
                module, examples(wanted, sizes), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=[tensor.name for tensor in wanted], output_names=[tensor.name for tensor in outputs],
                dynamic_shapes=(dynamic,),
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            raise ModelError(f"{type(module.traced_model).__name__} cannot be traced: {last_line(error)}") from error
    assert program is not None
    graph = apply(rename(program.model))
    for value, tensor in zip(graph.graph.inputs, wanted, strict=True):
        value.shape = ir.Shape(tensor.shape)
    for value, tensor in zip(graph.graph.outputs, outputs, strict=True):
        assert value.shape is not None
        pairs = zip(value.shape, tensor.shape, strict=True)
        value.shape = ir.Shape([size if isinstance(size, int) else name for size, name in pairs])
    return graph


def examples(wanted: Sequence[GraphTensor], sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """Return ones of the inputs' shapes, each named axis of a size of its own: 0 and 1 would be taken for constants."""
    shapes = [[sizes[size] if isinstance(size, str) else size for size in tensor.shape] for tensor in wanted]
    return tuple(torch.ones(shape, dtype=getattr(torch, tensor.dtype)) for shape, tensor in zip(shapes, wanted, strict=True))


class Traced(nn.Module):
    """The traced function: input tensors, in the order of `names`, to those of `outputs`."""

    def __init__(self, model: Any, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.traced_model = model
        self.names, self.outputs = list(names), list(outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.traced_model(**dict(zip(self.names, inputs, strict=True)))
        return tuple(found[name] for name in self.outputs)


class GridLinear(nn.Module):
    """Emits MatMulNBits (ONNX Runtime's ContribOperators.md): x `[..., K]` to `[..., N]`."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None, accuracy_level: int) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", bias)
        self.weight = None  # T5 asks for its type
        self.num_outputs = weight.shape[0]
        self.attributes: dict[str, Any] = {
            "N": weight.shape[0], "K": weight.shape[1], "bits": weight.bits, "block_size": weight.block_size,
            "accuracy_level": accuracy_level,
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x, self.codes, self.scales] + ([None, None, self.bias] if self.bias is not None else [])
        shape = (*x.shape[:-1], self.num_outputs)
        return emit("com.microsoft::MatMulNBits", inputs, self.attributes, shape)


class GridEmbedding(nn.Module):
    """Gathers rows of 8-bit codes and scales and unpacks them: `GatherBlockQuantized` has no WebAssembly kernel."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedTensor, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        assert weight.bits == 8, "merge keeps embeddings in 8 bits"
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.width = weight.num_inputs

    def forward(self, ids: Tensor) -> Tensor:
        codes = emit("Gather", [self.codes, ids], {"axis": 0}, (*ids.shape, *self.codes.shape[1:]), torch.uint8)
        scales = emit("Gather", [self.scales, ids], {"axis": 0}, (*ids.shape, self.scales.shape[1]))
        rows = ((codes.float() - 128.0) * scales.unsqueeze(-1)).flatten(-2)
        rows = rows if rows.shape[-1] == self.width else rows[..., : self.width]
        return rows if self.scale == 1.0 else rows * self.scale


def load_for_export(checkpoint: MergedCheckpoint, accuracy_levels: Mapping[str, int]) -> Any:
    """Return transformers' model with the folder's tensors in it, its layers on the grid as modules that emit nodes."""
    register_attention()
    model = build_network(checkpoint.config, get_task(checkpoint.task).auto_class, checkpoint.labels).eval()
    model.config._attn_implementation = ATTENTION if model._supports_attention_backend else "eager"
    for path in checkpoint.layers:
        weight = checkpoint.read_linear(path)
        assert isinstance(weight, QuantizedTensor)
        if isinstance(model.get_submodule(path), nn.Embedding):
            model.set_submodule(path, GridEmbedding(weight))
        else:
            bias = checkpoint.read(f"{path}.bias") if checkpoint.has(f"{path}.bias") else None
            model.set_submodule(path, GridLinear(weight, bias, accuracy_levels.get(path, FAST_LEVEL)))
    fill_from(model, checkpoint)
    return model


def fill_from(model: nn.Module, checkpoint: MergedCheckpoint, skip: Collection[str] = ()) -> None:
    """Give every parameter but those of the names `skip`, and what other buffers the folder has, its tensor; what modules
    share (BERT's head and the module around it own one bias) they share again."""
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    for names in shared.values():
        if names[0] in skip:
            continue
        stored = next((name for name in names if checkpoint.has(name)), names[0])
        filled = nn.Parameter(checkpoint.read(stored), requires_grad=False)
        for name in names:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, filled)
    for name, buffer in list(model.named_buffers()):
        if checkpoint.has(name):  # statistics of batch norm
            buffer.copy_(checkpoint.read(name))


def rename(model: ir.Model) -> ir.Model:
    """Name initializers as the merged folder does, and MatMulNBits nodes after their layer, numbered where it is used again."""
    for name in list(model.graph.initializers):
        if name.startswith(WRAPPER):
            model.graph.initializers[name].name = name.removeprefix(WRAPPER)
    uses: Counter[str] = Counter()
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            layer = layer_of(node)
            uses[layer] += 1
            node.name = f"{layer}/MatMulNBits" + (f"_{uses[layer]}" if uses[layer] > 1 else "")
    return model


def layer_of(node: ir.Node) -> str:
    codes = node.inputs[1]
    assert codes is not None
    return str(codes.name).removesuffix(".codes")


def matmul_nodes(model: ir.Model) -> dict[str, dict[str, Any]]:
    nodes = {}
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            facts = {name: node.attributes[name].as_int() for name in ("bits", "block_size", "accuracy_level")}
            nodes[str(node.name)] = {"rows": {layer_of(node): [0, node.attributes["N"].as_int()]}, **facts}
    return nodes


@contextmanager
def lengths_traced(network: nn.Module) -> Iterator[None]:
    """Let `len` of a tensor be its symbolic size in the files of transformers that a network's classes come from: Python's own
    must be a number, and fixes the batch (RT-DETR's `len(source_flatten)`)."""
    names = {type(module).__module__ for module in network.modules()}
    files = [sys.modules[name] for name in names if name.startswith("transformers.models.")]
    for file in files:
        file.__dict__["len"] = lambda found: found.shape[0] if isinstance(found, Tensor) else builtins.len(found)
    try:
        yield
    finally:
        for file in files:
            del file.__dict__["len"]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's remarks on its own code and on packages that are not needed here off the user's screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def last_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
