"""A decoder's graph as the operations that decoder.c computes.

Known are the nodes of the Llama, Mistral, Qwen2 and SmolLM shapes as export/decoder.py writes them: an embedding of 4 or 8
bits, RMS norms, MatMulNBits of 2, 4 or 8 bits (accuracy_level 4, no zero points), GroupQueryAttention with rotary positions
over packed queries, keys and values, a gate of SiLU. What only counts positions is done here: tokens come without padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.native.onnx_file import Graph, Node
from edgelora.native.operations import (
    ATTEND,
    EMBED,
    GATE,
    NORM,
    PRODUCT,
    ROTATE,
    ROUND,
    SELECT,
    Operation,
    Program,
    share_buffers,
)

PRODUCER = "edgelora"  # whose graphs mean what is said above
COUNTERS = {
    "Shape", "Gather", "ReduceSum", "Sub", "Add", "Cast", "ArgMax", "Equal", "Where", "Min", "Max", "Range", "Unsqueeze",
}  # fmt: skip
UNPACKING = {
    8: ["Gather", "Gather", "Cast", "Sub", "Unsqueeze", "Mul", "Reshape"],
    4: [
        "Gather", "Gather", "BitwiseAnd", "BitShift", "Unsqueeze", "Unsqueeze", "Concat", "Reshape", "Cast", "Sub",
        "Unsqueeze", "Mul", "Reshape",
    ],
}  # fmt: skip


class UnknownGraphError(Exception):
    """Something of the graph is not known here."""


def program_of(graph: Graph) -> Program:
    """Return a graph's program. Raises UnknownGraphError, with the reason."""
    if graph.producer != PRODUCER:
        raise UnknownGraphError("the graph is another program's")
    try:
        return Reader(graph).read()
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UnknownGraphError(f"nodes that do not fit together: {error}") from None


class Reader:
    """Follows the values of a graph from input_ids to logits."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.program = graph, Program()
        self.places: dict[str, int] = {}  # values that are activations, and their buffers
        self.counted = {"input_ids", "attention_mask", "num_logits_to_keep"}  # values that count positions
        self.halves: dict[str, tuple[str, int]] = {}  # outputs of Split, SiLU: the value they are of, and which half
        self.unpacking: list[Node] = []
        self.tables: dict[str, NDArray[Any]] = {}
        self.name = ""  # of the node that is read
        self.unrounded = ""  # the value of an attention, until a product reads it
        self.ended = False

    def read(self) -> Program:
        kinds = {
            "MatMulNBits": self.product, "SimplifiedLayerNormalization": self.norm, "GatherND": self.select,
            "SkipSimplifiedLayerNormalization": self.norm, "GroupQueryAttention": self.attention, "Split": self.split,
            "QuickGelu": self.silu, "Mul": self.gate,
        }  # fmt: skip
        for node in self.graph.nodes:
            self.name = label(node)
            if self.counts(node):
                self.counted.update(node.outputs)
            elif not self.places:
                self.embedding(node)
            elif node.operator in kinds:
                kinds[node.operator](node)
            else:
                raise UnknownGraphError(f"the operator {node.operator} is not known here")
        if not self.ended:
            raise UnknownGraphError("the graph has no logits")
        if any(step.kind == GATE and not self.program.blocks[step.output] for step in self.program.operations):
            raise UnknownGraphError("a gate that no product reads")
        share_buffers(self.program)
        return self.program

    def counts(self, node: Node) -> bool:
        small = {name for name in node.inputs if name in self.graph.tensors and self.graph.tensors[name].size <= 4}
        return node.operator in COUNTERS and set(node.inputs) <= self.counted | small

    def embedding(self, node: Node) -> None:
        self.unpacking.append(node)
        if node.operator != "Reshape" or len(self.unpacking) < len(UNPACKING[8]):
            return
        operators = [one.operator for one in self.unpacking]
        if operators == UNPACKING[4][:8]:
            return  # its first Reshape
        if operators not in UNPACKING.values() or any(one.inputs[1] != "input_ids" for one in self.unpacking[:2]):
            raise UnknownGraphError("the embedding is not one of 4 or 8 bits")
        bits = 8 if operators == UNPACKING[8] else 4
        codes, scales = (self.weight(one.inputs[0], dtype) for one, dtype in zip(self.unpacking[:2], GRID, strict=False))
        if codes.ndim != 3 or scales.shape != codes.shape[:2]:
            raise UnknownGraphError("the embedding has another shape")
        block = codes.shape[2] * 8 // bits
        width, self.program.rows = codes.shape[1] * block, codes.shape[0]
        self.add(
            EMBED, None, self.place(node.outputs[0], width), k=width, bits=bits, block=block,
            codes=self.address(codes), scales=self.address(scales),
        )  # fmt: skip

    def norm(self, node: Node) -> None:
        skips = node.operator.startswith("Skip")
        width = self.width(node.inputs[0])
        weight = self.weight(node.inputs[1 + skips], np.float32).copy()  # small: the file's pages can go
        if weight.shape != (width,) or len(node.inputs) > 2 + skips or node.attributes.get("axis", -1) != -1:
            raise UnknownGraphError("a norm with a bias, or over another axis")
        skip = self.places[node.inputs[1]] if skips else -1
        if skips and self.width(node.inputs[1]) != width:
            raise UnknownGraphError("a sum of unlike widths")
        total = -1
        if skips:
            total = self.place(node.outputs[3] if len(node.outputs) > 3 else f"{node.outputs[0]}/sum", width)
        self.add(
            NORM, node.inputs[0], self.place(node.outputs[0], width), skip=skip, sum=total, k=width,
            number=node.attributes["epsilon"], weight=self.address(weight),
        )  # fmt: skip

    def product(self, node: Node) -> None:
        n, k, bits, block = (int(node.attributes.get(name) or 0) for name in ("N", "K", "bits", "block_size"))
        if bits not in (2, 4, 8) or block not in (16, 32, 64, 128, 256) or k % block:
            raise UnknownGraphError(f"a product of {bits} bits in blocks of {block}, {k} inputs")
        if node.attributes.get("accuracy_level") != 4 or any(node.inputs[3:5]) or self.width(node.inputs[0]) != k:
            raise UnknownGraphError("a product with zero points, or with other activations than of 8 bits")
        codes, scales = (self.weight(name, dtype) for name, dtype in zip(node.inputs[1:3], GRID, strict=True))
        bias = self.weight(node.inputs[5], np.float32) if len(node.inputs) > 5 else None
        if codes.size != n * k * bits // 8 or scales.size != n * k // block or (bias is not None and bias.shape != (n,)):
            raise UnknownGraphError("weights of another size")
        if self.program.blocks[self.places[node.inputs[0]]] not in (0, block):
            raise UnknownGraphError("products of one input in unlike blocks")
        self.program.blocks[self.places[node.inputs[0]]] = block
        if node.inputs[0] == self.unrounded:
            self.add(ROUND, node.inputs[0], self.places[node.inputs[0]])
        self.ended = node.outputs[0] == "logits"
        self.program.vocab_size = n
        if self.ended and n < self.program.rows:
            raise UnknownGraphError("a head smaller than the embedding")
        self.add(
            PRODUCT, node.inputs[0], -1 if self.ended else self.place(node.outputs[0], n), n=n, k=k, bits=bits, block=block,
            codes=self.address(codes), scales=self.address(scales), weight=None if bias is None else self.address(bias),
        )  # fmt: skip

    def attention(self, node: Node) -> None:
        known = {"num_heads", "kv_num_heads", "do_rotary", "scale", "local_window_size"}
        heads, kv_heads = (int(node.attributes.get(name) or 0) for name in ("num_heads", "kv_num_heads"))
        if (
            set(node.attributes) - known
            or node.attributes.get("do_rotary") != 1
            or any(node.inputs[1:3])
            or len(node.inputs) > 9
        ):
            raise UnknownGraphError("attention with a cap, or without rotary positions")
        cosines, sines = (self.table(name) for name in node.inputs[7:9])
        dim, layer = 2 * cosines.shape[1], len(self.program.cache_shapes) // 2
        if 0 <= int(node.attributes.get("local_window_size") or -1) < len(cosines):
            raise UnknownGraphError("attention over a window")
        if (
            not heads
            or not kv_heads
            or heads % kv_heads
            or dim % 16
            or self.width(node.inputs[0]) != (heads + 2 * kv_heads) * dim
        ):
            raise UnknownGraphError("attention whose rotary positions are of a part of a head")
        if sines.shape != cosines.shape or node.inputs[3:5] != (key := f"past_key_values.{layer}.key", f"{key[:-3]}value"):
            raise UnknownGraphError("attention over another cache")
        self.program.cache_shapes |= dict.fromkeys(node.inputs[3:5], (kv_heads, dim))
        self.program.positions = min(self.program.positions or len(cosines), len(cosines))
        shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "layer": layer}
        tables = {"scales": self.address(cosines), "weight": self.address(sines)}
        out = self.place(node.outputs[0], heads * dim)
        self.add(ROTATE, node.inputs[0], out, **shape, **tables)
        self.add(ATTEND, node.inputs[0], out, **shape, number=node.attributes.get("scale") or dim**-0.5)
        self.unrounded = node.outputs[0]

    def split(self, node: Node) -> None:
        if node.attributes.get("axis") != -1 or len(node.outputs) != 2:
            raise UnknownGraphError("a split that is not in two halves")
        self.halves.update({name: (node.inputs[0], half) for half, name in enumerate(node.outputs)})

    def silu(self, node: Node) -> None:
        source, half = self.halves.get(node.inputs[0], ("", 1))
        if half or node.attributes.get("alpha") != 1.0:
            raise UnknownGraphError("an activation that is not SiLU")
        self.halves[node.outputs[0]] = (source, 2)

    def gate(self, node: Node) -> None:
        (source, activated), (other, half) = (self.halves.get(name, (name, -1)) for name in node.inputs)
        if source != other or (activated, half) != (2, 1):
            raise UnknownGraphError("a gate of another form")
        width = self.width(source) // 2
        self.add(GATE, source, self.place(node.outputs[0], width), k=width)

    def select(self, node: Node) -> None:
        if node.inputs[1] not in self.counted:
            raise UnknownGraphError("rows that are chosen by what was computed")
        self.add(SELECT, node.inputs[0], self.places[node.inputs[0]])
        self.places[node.outputs[0]] = self.places[node.inputs[0]]
        if node.inputs[0] == self.unrounded:
            self.unrounded = node.outputs[0]

    def table(self, name: str) -> NDArray[Any]:
        """Return a copy of a table that all layers read; one for all."""
        if name not in self.tables:
            self.tables[name] = self.weight(name, np.float32).copy()
        return self.tables[name]

    def weight(self, name: str, dtype: Any) -> NDArray[Any]:
        found = self.graph.tensors.get(name)
        if found is None or found.dtype != dtype:
            raise UnknownGraphError(f"{name} is not among the weights")
        return found

    def address(self, array: NDArray[Any]) -> int:
        if not array.flags.c_contiguous or not array.flags.aligned:
            raise UnknownGraphError("weights that do not begin where numbers do")
        self.program.kept.append(array)
        return int(array.ctypes.data)

    def width(self, name: str) -> int:
        if name not in self.places:
            raise UnknownGraphError(f"{name} is not computed from tokens")
        return self.program.widths[self.places[name]]

    def place(self, name: str, width: int) -> int:
        self.places[name] = len(self.program.widths)
        self.program.widths.append(width)
        self.program.blocks.append(0)
        return self.places[name]

    def add(self, kind: int, source: str | None, output: int, **values: Any) -> None:
        step = {"kind": kind, "input": -1 if source is None else self.places[source], "output": output, "skip": -1, "sum": -1}
        self.program.operations.append(Operation(**{**step, **values}))
        self.program.names.append(OWN_NAMES.get(kind, self.name))


GRID = (np.uint8, np.float32)
OWN_NAMES = {ROTATE: "rotary positions", ROUND: "rounding"}
NAMES = {"Reshape": "embedding", "Mul": "SiLU and Mul", "GatherND": "choosing rows"}


def label(node: Node) -> str:
    """Return the operator and, of a product, the layer without its number: "MatMulNBits gate_proj+up_proj"."""
    if node.operator != "MatMulNBits":
        return NAMES.get(node.operator, node.operator)
    return f"{node.operator} {node.outputs[0].partition('/')[0].rpartition('.')[2]}".replace(" logits", " head")
