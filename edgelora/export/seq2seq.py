"""The two ONNX graphs of an encoder-decoder, traced from transformers' own class, in the layout of optimum and transformers.js.

    encoder_model          the encoder's inputs → last_hidden_state
    decoder_model_merged   input_ids [B, T], encoder_hidden_states [B, S, H], encoder_attention_mask [B, S] where the encoder
                           has one, past_key_values.N.{decoder,encoder}.{key,value} fp32 [B, heads, past, head_dim] → logits
                           [B, T, vocabulary], present.N.…

One body serves the first step and all others: where past_key_values.0.encoder.key has length 0, keys and values of the
encoder's states are computed; else no row of these states is read, and what was computed then is taken. So weights and nodes
are there once, where optimum's merged decoder has them in both branches of an `If`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from edgelora.export.attention import ATTENTION, CACHED_ATTENTION, register_attention
from edgelora.export.graph import save
from edgelora.export.traced import FAST_LEVEL, GridEmbedding, GridLinear, Traced, fill_from, matmul_nodes, trace
from edgelora.models.seq2seq import build_seq2seq, stack
from edgelora.models.tables import scale_of, tables
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.grid import QuantizedTensor
from edgelora.tasks import get_task
from edgelora.tasks.base import GraphTensor

HIDDEN = "encoder_hidden_states"
FIRST_CROSS = "past_key_values.0.encoder.key"
# The axes while it is traced: the mask is of what is cached and what is not
SIZES = {
    "batch_size": 2, "decoder_sequence_length": 3, "past_decoder_sequence_length": 4, "past_encoder_sequence_length": 5,
    "encoder_sequence_length": 7, "read_length": 12,
}  # fmt: skip
KEPT = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")  # of each layer, in the order that optimum has


@dataclass(frozen=True)
class Graphs:
    """nodes: as in export/traced.py, of both files, with the "file" where it is the encoder's; inputs: the encoder's."""

    nodes: dict[str, dict[str, Any]]
    inputs: tuple[str, ...]


def export_seq2seq(checkpoint: MergedCheckpoint, encoder: Path, decoder: Path, levels: Mapping[str, int]) -> Graphs:
    """Write both graphs and their weights. Raises ModelError if torch cannot trace the model."""
    task = get_task(checkpoint.task)
    model, aliases = load_for_export(checkpoint, levels)
    wanted = task.inputs(checkpoint.config, inspect.signature(model.forward).parameters)
    names = [tensor.name for tensor in wanted]
    set_attention(model, ATTENTION)
    reading = shared(trace(Reading(model, names, [output.name for output in task.outputs]), wanted, task.outputs), aliases)
    save(reading, encoder)
    nodes = {name: {**facts, "file": encoder.name} for name, facts in matmul_nodes(reading).items()}
    set_attention(model, CACHED_ATTENTION)
    inputs, outputs = decoder_tensors(model, masked="attention_mask" in names)
    writing = shared(trace(Decoding(model, [tensor.name for tensor in inputs]), inputs, outputs, SIZES), aliases)
    save(read_once(writing), decoder)
    return Graphs({**nodes, **matmul_nodes(writing)}, tuple(names))


class Reading(Traced):
    """The encoder alone, under the names that it has in the whole model."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.traced_model.get_encoder()(**dict(zip(self.names, inputs, strict=True)))
        return tuple(found[name] for name in self.outputs)


class Decoding(nn.Module):
    """The decoder and the LM head with a cache that grows: what is cached, and the encoder's rows that are not yet."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.traced_model = model
        self.names = list(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        given = dict(zip(self.names, inputs, strict=True))
        past = [tensor for name, tensor in given.items() if name.startswith("past")]
        own = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 4)])
        cross = DynamicCache([(past[i + 2], past[i + 3]) for i in range(0, len(past), 4)])
        cache = EncoderDecoderCache(own, cross)
        cache.is_updated = dict.fromkeys(cache.is_updated, False)  # rows that are not cached come at the end of those that are
        mask = {"attention_mask": given["encoder_attention_mask"]} if "encoder_attention_mask" in given else {}
        ids, hidden = given["input_ids"], given[HIDDEN]
        found = self.traced_model(
            encoder_outputs=(hidden,), decoder_input_ids=ids, past_key_values=cache, use_cache=True, **mask
        )
        present: list[Tensor] = []
        for layer, other in zip(own.layers, cross.layers, strict=True):
            present += [layer.keys, layer.values, other.keys, other.values]
        return (found.logits, *present)


def load_for_export(checkpoint: MergedCheckpoint, levels: Mapping[str, int]) -> tuple[Any, dict[str, str]]:
    """Return transformers' model with the folder's tensors in it, its layers on the grid as modules that emit nodes; and for
    each module that reads a table the path that the table has in the folder."""
    register_attention()
    model = build_seq2seq(checkpoint.config, get_task(checkpoint.task).auto_class).eval()
    found = tables(model)
    aliases = {path: table.path for table in found for path in table.modules}

    def linear(path: str, weight: QuantizedTensor) -> GridLinear:
        own = getattr(model.get_submodule(path), "bias", None)
        names = [name for name, value in model.named_parameters(remove_duplicate=False) if value is own]
        bias = next((checkpoint.read(name) for name in names if checkpoint.has(name)), None)
        return GridLinear(weight, bias, levels.get(path, FAST_LEVEL))

    for table in found:
        weight = checkpoint.read_linear(table.path)
        for path in table.modules:
            if not isinstance(weight, QuantizedTensor):
                model.get_submodule(path).weight = nn.Parameter(weight, requires_grad=False)
            elif path == table.head:
                model.set_submodule(path, linear(path, weight))
            else:
                model.set_submodule(path, GridEmbedding(weight, scale_of(model.get_submodule(path))))
    for path in checkpoint.layers:
        if path not in aliases:
            weight = checkpoint.read_linear(path)
            assert isinstance(weight, QuantizedTensor)
            model.set_submodule(path, linear(path, weight))
    fill_from(model, checkpoint, skip={f"{path}.weight" for path in aliases})
    return model, aliases


def set_attention(model: Any, name: str) -> None:
    """Let every part of the model compute attention by the implementation of that name, where its classes ask for one."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            asks = getattr(module, "_supports_sdpa", False) or getattr(module, "_supports_attention_backend", False)
            config._attn_implementation = name if asks else "eager"


def decoder_tensors(model: Any, *, masked: bool) -> tuple[list[GraphTensor], list[GraphTensor]]:
    """Return the inputs and outputs of the decoder's graph."""
    config = model.get_decoder().config
    heads = next(int(getattr(config, name)) for name in HEADS if getattr(config, name, None))
    width = int(getattr(config, "d_kv", 0) or 0) or int(config.hidden_size) // heads
    read = int(getattr(model.get_encoder().config, "hidden_size", config.hidden_size))
    mask = [GraphTensor("encoder_attention_mask", "int64", ("batch_size", "read_length"))] if masked else []
    inputs = [
        *mask,
        GraphTensor("input_ids", "int64", ("batch_size", "decoder_sequence_length")),
        GraphTensor(HIDDEN, "float32", ("batch_size", "encoder_sequence_length", read)),
    ]
    outputs = [GraphTensor("logits", "float32", ("batch_size", "decoder_sequence_length", "vocab_size"))]
    for layer in range(len(stack(model.get_decoder()))):
        for kept in KEPT:
            side = kept.partition(".")[0]
            shape = ("batch_size", heads, f"past_{side}_sequence_length", width)
            inputs.append(GraphTensor(f"past_key_values.{layer}.{kept}", "float32", shape))
            outputs.append(GraphTensor(f"present.{layer}.{kept}", "float32", (*shape[:2], f"{side}_length", width)))
    return inputs, outputs


HEADS = ("decoder_attention_heads", "num_heads", "num_attention_heads", "n_head")


def shared(model: ir.Model, aliases: Mapping[str, str]) -> ir.Model:
    """Let a table that several modules read be one tensor, under the name that it has in the folder."""
    initializers = model.graph.initializers
    for name in list(initializers):
        path, _, part = name.rpartition(".")
        kept = f"{aliases.get(path, path)}.{part}"
        if kept == name:
            continue
        value = initializers[name]
        if kept in initializers:
            value.replace_all_uses_with(initializers[kept])
            del initializers[name]
        else:
            value.name = kept
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            codes = node.inputs[1]
            assert codes is not None
            node.name = f"{str(codes.name).removesuffix('.codes')}/MatMulNBits"
    return model


def read_once(model: ir.Model) -> ir.Model:
    """Let the decoder compute keys and values of all of the encoder's states where none are cached, and of none where they are.

    Slice: rows 0 to length × (cached length = 0).
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    hidden = inputs[HIDDEN]
    constants = {
        name: ir.Value(name=f"read_once/{name}", const_value=ir.tensor([number], name=f"read_once/{name}"))
        for name, number in (("zero", 0), ("one", 1))
    }
    for value in constants.values():
        graph.register_initializer(value)
    zero, one = constants["zero"], constants["one"]
    cached = ir.node("Shape", [inputs[FIRST_CROSS]], {"start": 2, "end": 3}, name="read_once/cached")
    first = ir.node("Equal", [cached.outputs[0], zero], name="read_once/first")
    factor = ir.node("Cast", [first.outputs[0]], {"to": ir.DataType.INT64}, name="read_once/factor")
    length = ir.node("Shape", [hidden], {"start": 1, "end": 2}, name="read_once/length")
    end = ir.node("Mul", [length.outputs[0], factor.outputs[0]], name="read_once/end")
    rows = ir.node("Slice", [hidden, zero, end.outputs[0], one], name="read_once/rows")
    new = [cached, first, factor, length, end, rows]
    others = [use for use in hidden.uses() if use.node not in (length, rows)]
    for node in new:
        node.outputs[0].name = f"{node.name}/out"
    for use in others:
        use.node.replace_input_with(use.idx, rows.outputs[0])
    graph.insert_before(graph[0], new)
    return model
