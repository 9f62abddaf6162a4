"""What the attention mask says: how long the rows are, where new tokens stand, and which of them get logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgelora.export.graph import GraphBuilder


@dataclass(frozen=True)
class Lengths:
    """Values that every layer reads. `mask` is the input: int64 [batch, total]."""

    mask: ir.Value
    sequence: ir.Value  # int64 []: tokens fed now
    total: ir.Value  # int64 []: tokens fed so far and now
    total_int32: ir.Value
    last_real: ir.Value  # int32 [batch]: real tokens of each row, less one: GroupQueryAttention's seqlens_k

    @classmethod
    def of(cls, g: GraphBuilder, ids: ir.Value, mask: ir.Value) -> Lengths:
        one = g.constant(1, np.int64)
        sequence = g.op("Gather", [g.op("Shape", [ids], "shape/ids"), one], "shape/sequence")
        total = g.op("Gather", [g.op("Shape", [mask], "shape/mask"), one], "shape/total")
        real = g.op("ReduceSum", [mask, g.constant([1], np.int64)], "mask/sum", keepdims=0)
        last_real = g.op("Cast", [g.op("Sub", [real, one], "mask/last")], "mask/seqlens", to=ir.DataType.INT32)
        return cls(mask, sequence, total, g.op("Cast", [total], "shape/total32", to=ir.DataType.INT32), last_real)


def selected_rows(g: GraphBuilder, keep: ir.Value, lengths: Lengths) -> ir.Value:
    """Return int64 [batch, num_logits, 1]: the rows of the sequence that get logits, the last of them at the last real token.

    keep: int64 []; how many, 0 for every row. Positions before the first row become row 0.
    """
    one, zero = g.constant(1, np.int64), g.constant(0, np.int64)
    mask = g.op("Cast", [lengths.mask], "select/mask", to=ir.DataType.INT32)
    last = g.op("ArgMax", [mask], "select/last", axis=1, keepdims=1, select_last_index=1)
    past = g.op("Sub", [lengths.total, lengths.sequence], "select/past")
    everything = g.op("Equal", [keep, zero], "select/all")
    final_row = g.op("Sub", [lengths.sequence, one], "select/final")
    end = g.op("Where", [everything, final_row, g.op("Sub", [last, past], "select/real")], "select/end")
    some = g.op("Min", [keep, lengths.sequence], "select/some")
    count = g.op("Where", [everything, lengths.sequence, some], "select/count")
    back = g.op("Sub", [count, one], "select/back")
    offsets = g.op("Sub", [g.op("Range", [zero, count, one], "select/range"), back], "select/offsets")
    rows = g.op("Max", [g.op("Add", [end, offsets], "select/rows"), zero], "select/clamped")
    return g.op("Unsqueeze", [rows, g.constant([-1], np.int64)], "select/index")


def new_positions(g: GraphBuilder, lengths: Lengths) -> ir.Value:
    """Return int64 [batch, sequence]: the position of each token fed now, counted over the real tokens of its row."""
    real = g.op("CumSum", [lengths.mask, g.constant(1, np.int64)], "positions/count")
    places = g.op("Sub", [real, g.constant(1, np.int64)], "positions/all")
    places = g.op("Max", [places, g.constant(0, np.int64)], "positions/clamped")
    past = g.op("Sub", [lengths.total, lengths.sequence], "positions/past")
    ends = [g.op("Unsqueeze", [value, g.constant([0], np.int64)], "positions/end") for value in (past, lengths.total)]
    return g.op("Slice", [places, *ends, g.constant([1], np.int64)], "positions/new")
