"""One parametrized ONNX graph for every causal decoder that `models/spec.py` can describe.

inputs   input_ids int64 [batch, sequence]
         attention_mask int64 [batch, total]             1 for real tokens; padding, if any, on the right
         past_key_values.N.key / .value fp32 [batch, kv_heads, past, head_dim]     past may be 0, or a shared buffer
         num_logits_to_keep int64 []                     an initializer that may be overridden: 1 gives the logits of each
                                                         row's last real token (default), k of the last k, 0 of every token
outputs  logits fp32 [batch, num_logits, vocabulary], present.N.key / .value. The declared length is 1, the default's:
         onnxruntime-genai takes it from there, and onnxruntime lets a run give more.

Every layer is: [norm] → attention → [norm] → residual → [norm] → MLP → [norm] → residual. The sum and the norm after it are
one node, q, k and v (gate and up) one product, and the last block computes only the rows whose logits are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgelora.errors import ModelError
from edgelora.export.adapters import Branches
from edgelora.export.graph import MICROSOFT, Array, GraphBuilder
from edgelora.export.lengths import Lengths, new_positions, selected_rows
from edgelora.export.linear import LinearLayers, Weights
from edgelora.models.rope import Rope
from edgelora.models.spec import DecoderSpec

SELECTOR = "num_logits_to_keep"


@dataclass
class DecoderGraph:
    """The finished graph and, for the manifest, what its MatMulNBits nodes hold."""

    model: ir.Model
    nodes: dict[str, dict[str, Any]]


@dataclass
class DecoderBuilder:
    weights: Weights
    spec: DecoderSpec
    max_positions: int
    accuracy_levels: Mapping[str, int] = field(default_factory=dict)
    branches: Branches | None = None
    kind: type[LinearLayers] = LinearLayers

    def __post_init__(self) -> None:
        if self.spec.head_dim % 8:
            raise ModelError(f"heads of {self.spec.head_dim} channels: ONNX Runtime's attention takes multiples of 8")
        self.g = GraphBuilder("decoder")
        self.layers = self.kind(self.g, self.weights, self.accuracy_levels, branches=self.branches)
        self.ropes: dict[Rope, tuple[ir.Value, ir.Value]] = {}
        self.places: ir.Value | None = None

    def build(self) -> DecoderGraph:
        spec, g = self.spec, self.g
        ids, past, lengths = self._inputs()
        keep = g.input(SELECTOR, ir.DataType.INT64, (), default=np.array(1, np.int64))
        rows = selected_rows(g, keep, lengths)
        x, delta, present = self._embed(ids, lengths), None, []
        for layer in range(spec.num_layers):
            last = layer == spec.num_layers - 1
            x, delta, cache = self._block(layer, x, delta, past[layer], lengths, rows if last else None)
            present.append(cache)
        hidden, _ = self._norm_of_sum(x, delta, spec.weight("final_norm"))
        g.output(self._logits(hidden), "logits", ir.DataType.FLOAT, ("batch_size", 1, spec.vocab_size))
        self._outputs(present)
        return DecoderGraph(g.model(), self.layers.nodes)

    def build_without_logits(self) -> ir.Model:
        """Return the graph that only fills the cache: the last layer ends with its keys and values."""
        ids, past, lengths = self._inputs()
        x, delta, present = self._embed(ids, lengths), None, []
        for layer in range(self.spec.num_layers - 1):
            x, delta, cache = self._block(layer, x, delta, past[layer], lengths, None)
            present.append(cache)
        h, _ = self._norm_of_sum(x, delta, self._path("attn_in", len(present)))
        _, key, value = self._attention(len(present), h, past[-1], lengths)
        self._outputs([*present, (key, value)])
        return self.g.model()

    def _inputs(self) -> tuple[ir.Value, list[tuple[ir.Value, ir.Value]], Lengths]:
        ids = self.g.input("input_ids", ir.DataType.INT64, ("batch_size", "sequence_length"))
        mask = self.g.input("attention_mask", ir.DataType.INT64, ("batch_size", "total_sequence_length"))
        past = [self._past(layer) for layer in range(self.spec.num_layers)]
        return ids, past, Lengths.of(self.g, ids, mask)

    def _outputs(self, present: list[tuple[ir.Value, ir.Value]]) -> None:
        shape = ("batch_size", self.spec.num_kv_heads, "total_sequence_length", self.spec.head_dim)
        for layer, (key, value) in enumerate(present):
            self.g.output(key, f"present.{layer}.key", ir.DataType.FLOAT, shape)
            self.g.output(value, f"present.{layer}.value", ir.DataType.FLOAT, shape)

    def _past(self, layer: int) -> tuple[ir.Value, ir.Value]:
        shape = ("batch_size", self.spec.num_kv_heads, "past_sequence_length", self.spec.head_dim)
        names = (f"past_key_values.{layer}.{part}" for part in ("key", "value"))
        key, value = (self.g.input(name, ir.DataType.FLOAT, shape) for name in names)
        return key, value

    def _embed(self, ids: ir.Value, lengths: Lengths) -> ir.Value:
        spec, g = self.spec, self.g
        x = self.layers.embedding(ids, spec.weight("embed"))
        if spec.embedding_scale != 1.0:
            x = g.op("Mul", [x, g.constant(spec.embedding_scale)], "embed/scale")
        if not spec.has("positions"):
            return x
        path = spec.weight("positions")
        table = g.weight(f"{path}.weight", self._read(f"{path}.weight")[: self.max_positions])
        return g.op("Add", [x, g.op("Gather", [table, new_positions(g, lengths)], f"{path}/Gather")], "positions/Add")

    def _block(
        self,
        layer: int,
        x: ir.Value,
        delta: ir.Value | None,
        past: tuple[ir.Value, ir.Value],
        lengths: Lengths,
        rows: ir.Value | None,
    ) -> tuple[ir.Value, ir.Value, tuple[ir.Value, ir.Value]]:
        """Return the residual stream, what is still to be added to it, and the layer's new cache."""
        spec = self.spec
        h, x = self._norm_of_sum(x, delta, self._path("attn_in", layer))
        attended, *cache = self._attention(layer, h, past, lengths)
        if rows is not None:
            attended, x = (self.g.op("GatherND", [v, rows], "select/GatherND", batch_dims=1) for v in (attended, x))
        delta = self._branch(self.layers.linear(attended, spec.weight("o", layer)), self._path("attn_out", layer))
        h, x = self._norm_of_sum(x, delta, self._path("mlp_in", layer))
        delta = self._branch(self._mlp(layer, h), self._path("mlp_out", layer))
        return x, delta, (cache[0], cache[1])

    def _branch(self, y: ir.Value, norm_path: str | None) -> ir.Value:
        """Return what a branch adds to the residual stream: normed and scaled where the family does that."""
        if norm_path is not None:
            y = self._norm(y, norm_path)
        if self.spec.residual_scale != 1.0:
            y = self.g.op("Mul", [y, self.g.constant(self.spec.residual_scale)], "residual/scale")
        return y

    def _attention(self, layer: int, h: ir.Value, past: tuple[ir.Value, ir.Value], lengths: Lengths) -> list[ir.Value]:
        spec = self.spec
        query, key, value = self._projections(layer, h)
        rope = spec.ropes[layer] if spec.ropes else None
        # GroupQueryAttention rotates at most head_dim // 16 * 8 pairs; heads of odd sizes are rotated before it.
        inside = rope is not None and rope.dim // 2 <= spec.head_dim // 16 * 8
        tables: list[ir.Value] = list(self._rope(rope)) if rope and inside else []
        if rope is not None and not inside:
            if key is None:
                query, key, value = self._split(query, layer)
            query = self._rotate(query, spec.num_heads, rope, layer, lengths)
            key = self._rotate(key, spec.num_kv_heads, rope, layer, lengths)
        attributes: dict[str, Any] = {"num_heads": spec.num_heads, "kv_num_heads": spec.num_kv_heads, "do_rotary": int(inside)}
        attributes["scale"] = spec.attention_scale
        if spec.attention_softcap:
            attributes["softcap"] = spec.attention_softcap
        window = spec.windows[layer] if spec.windows else None
        if window is not None:
            attributes["local_window_size"] = window
        inputs = [query, key, value, *past, lengths.last_real, lengths.total_int32, *tables]
        name = f"layers.{layer}/GroupQueryAttention"
        return self.g.ops("GroupQueryAttention", inputs, name, 3, domain=MICROSOFT, **attributes)

    def _rotate(self, x: ir.Value, num_heads: int, rope: Rope, layer: int, lengths: Lengths) -> ir.Value:
        if self.places is None:
            self.places = new_positions(self.g, lengths)
        return self.g.op(
            "RotaryEmbedding", [x, self.places, *self._rope(rope)], f"layers.{layer}/RotaryEmbedding", domain=MICROSOFT,
            num_heads=num_heads, rotary_embedding_dim=0 if rope.dim == self.spec.head_dim else rope.dim,
        )  # fmt: skip

    def _split(self, packed: ir.Value, layer: int) -> list[ir.Value]:
        heads, kv = self.spec.num_heads * self.spec.head_dim, self.spec.num_kv_heads * self.spec.head_dim
        return self.g.ops("Split", [packed, self.g.constant([heads, kv, kv], np.int64)], f"layers.{layer}/qkv", 3, axis=-1)

    def _projections(self, layer: int, h: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Return query, key and value; key and value are None where the query holds all three."""
        spec = self.spec
        if spec.has("qkv"):
            packed = self.layers.linear(h, spec.weight("qkv", layer))
            if spec.qk_norm is None:
                return packed, None, None
            heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
            q, k, v = self.g.ops(
                "Split", [packed, self.g.constant([heads, kv, kv], np.int64)], f"layers.{layer}/qkv", 3, axis=-1
            )
        else:
            paths = [spec.weight(role, layer) for role in ("q", "k", "v")]
            if spec.qk_norm is None and self.layers.can_pack(paths):
                return self.layers.linear(h, *paths), None, None
            q, k, v = (self.layers.linear(h, path) for path in paths)
        if spec.qk_norm is not None:
            q, k = (self._head_norm(x, spec.weight(role, layer)) for x, role in ((q, "q_norm"), (k, "k_norm")))
        return q, k, v

    def _head_norm(self, x: ir.Value, path: str) -> ir.Value:
        """Norm q or k: over all channels (OLMo 2) or over each head's own (Qwen3, Gemma 3)."""
        if self.spec.qk_norm == "full":
            return self._norm(x, path)
        g, dim = self.g, self.spec.head_dim
        heads = g.op("Reshape", [x, g.constant([0, 0, -1, dim], np.int64)], f"{path}/heads")
        flat = g.op("Flatten", [heads], f"{path}/flat", axis=3)
        normed = self._norm(flat, path)
        return g.op("Reshape", [normed, g.op("Shape", [x], f"{path}/shape")], f"{path}/Reshape")

    def _rope(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """Return cos and sin, fp32 [max_positions, rotary_dim / 2], one pair for all layers that share them."""
        if rope not in self.ropes:
            angles = np.outer(np.arange(self.max_positions), np.array(rope.inverse_frequencies, np.float64))
            suffix = f".{len(self.ropes)}" if self.ropes else ""
            cos, sin = (
                self.g.weight(f"{name}{suffix}", (function(angles) * rope.attention_factor).astype(np.float32))
                for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin))
            )
            self.ropes[rope] = cos, sin
        return self.ropes[rope]

    def _mlp(self, layer: int, h: ir.Value) -> ir.Value:
        spec, g = self.spec, self.g
        if not spec.gated:
            up = self.layers.linear(h, spec.weight("up", layer))
            return self.layers.linear(self._activation(up, layer), spec.weight("down", layer))
        paths = [spec.weight(role, layer) for role in (("gate_up",) if spec.has("gate_up") else ("gate", "up"))]
        if len(paths) == 1 or self.layers.can_pack(paths):
            both = self.layers.linear(h, *paths)
            gate, up = g.ops("Split", [both], f"layers.{layer}/gate_up", 2, axis=-1, num_outputs=2)
        else:
            gate, up = (self.layers.linear(h, path) for path in paths)
        product = g.op("Mul", [self._activation(gate, layer), up], f"layers.{layer}/gated")
        return self.layers.linear(product, spec.weight("down", layer))

    def _activation(self, x: ir.Value, layer: int) -> ir.Value:
        name = f"layers.{layer}/{self.spec.activation}"
        if self.spec.activation == "silu":
            return self.g.op("QuickGelu", [x], name, domain=MICROSOFT, alpha=1.0)  # x * sigmoid(alpha x)
        if self.spec.activation == "relu":
            return self.g.op("Relu", [x], name)
        op_type = {"gelu": "Gelu", "gelu_tanh": "FastGelu"}[self.spec.activation]
        return self.g.op(op_type, [x], name, domain=MICROSOFT)

    def _norm_of_sum(self, x: ir.Value, delta: ir.Value | None, path: str | None) -> tuple[ir.Value, ir.Value]:
        """Return norm(x + delta) and x + delta; the norm is left out where `path` is None."""
        if path is None:
            total = x if delta is None else self.g.op("Add", [x, delta], "residual/Add")
            return total, total
        if delta is None:
            return self._norm(x, path), x
        op_type = "SkipSimplifiedLayerNormalization" if self.spec.norm.kind == "rms" else "SkipLayerNormalization"
        inputs = [x, delta, *self._norm_weights(path)]
        normed, _, _, total = self.g.ops(op_type, inputs, f"{path}/norm", 4, domain=MICROSOFT, epsilon=self.spec.norm.eps)
        return normed, total

    def _norm(self, x: ir.Value, path: str) -> ir.Value:
        op_type = "SimplifiedLayerNormalization" if self.spec.norm.kind == "rms" else "LayerNormalization"
        return self.g.op(
            op_type, [x, *self._norm_weights(path)], f"{path}/norm", axis=-1, epsilon=self.spec.norm.eps, stash_type=1
        )

    def _norm_weights(self, path: str) -> list[ir.Value]:
        """Return [weight] or, for LayerNorm with a bias, [weight, bias]; the same initializer when asked again."""
        names = [f"{path}.weight"]
        if self.spec.norm.kind == "layer" and f"{path}.bias" in self.weights.names():
            names.append(f"{path}.bias")
        known = self.g.graph.initializers
        offset = self.spec.norm.offset
        return [known[n] if n in known else self.g.weight(n, self._read(n) + (offset if n == names[0] else 0.0)) for n in names]

    def _logits(self, hidden: ir.Value) -> ir.Value:
        spec, g = self.spec, self.g
        logits = self.layers.linear(hidden, spec.weight("embed" if spec.tied else "head"))
        if spec.logits_scale != 1.0:
            logits = g.op("Mul", [logits, g.constant(spec.logits_scale)], "logits/scale")
        if spec.logits_softcap:
            cap = g.constant(spec.logits_softcap)
            logits = g.op("Tanh", [g.op("Div", [logits, cap], "logits/Div")], "logits/Tanh")
            logits = g.op("Mul", [logits, cap], "logits/cap")
        return logits

    def _path(self, role: str, layer: int) -> str | None:
        return self.spec.weight(role, layer) if self.spec.has(role) else None

    def _read(self, name: str) -> Array:
        array: Array = self.weights.read(name).float().numpy()
        return array


def build_decoder(
    weights: Weights,
    spec: DecoderSpec,
    *,
    max_positions: int | None = None,
    accuracy_levels: Mapping[str, int] | None = None,
    branches: Branches | None = None,
) -> DecoderGraph:
    """Build the graph of a decoder from a merged checkpoint. `accuracy_levels` names the linears that are not at level 4,
    `branches` are the adapters beside the weights."""
    return DecoderBuilder(weights, spec, max_positions or spec.max_positions, accuracy_levels or {}, branches).build()
