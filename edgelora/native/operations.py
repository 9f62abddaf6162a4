"""What decoder.c is given: operations, and the buffers between them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

EMBED, NORM, PRODUCT, ROTATE, ATTEND, GATE, SELECT, ROUND = range(8)
PLACES = ("input", "skip", "output", "sum")


class Operation(ctypes.Structure):
    """One step; `Operation` of decoder.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in (
            "kind", "input", "skip", "output", "sum", "n", "k", "bits", "block", "heads", "kv_heads", "dim", "layer", "next",
        )),
        ("number", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "weight")),
    )  # fmt: skip


@dataclass
class Program:
    """What decoder.c needs: operations, the buffers between them, and what their addresses point to."""

    operations: list[Operation] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the operations: "MatMulNBits o_proj"
    widths: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    kept: list[NDArray[Any]] = field(default_factory=list)
    cache_shapes: dict[str, tuple[int, int]] = field(default_factory=dict)  # (kv_heads, head_dim) by the graph's input
    rows: int = 0  # of the embedding
    vocab_size: int = 0
    positions: int = 0  # that the rotary tables reach


def share_buffers(program: Program) -> None:
    """Let values of one width that are not needed at the same time have one buffer."""
    last = {place: at for at, step in enumerate(program.operations) for place in places_of(step)}
    found: dict[int, int] = {}
    free: dict[tuple[int, int], list[int]] = {}
    shapes: list[tuple[int, int]] = []
    for at, step in enumerate(program.operations):
        for place in places_of(step):
            if place not in found:
                shape = (program.widths[place], program.blocks[place])
                spare = free.get(shape)
                found[place] = spare.pop() if spare else len(shapes)
                if found[place] == len(shapes):
                    shapes.append(shape)
        for place in {place for place in places_of(step) if last[place] == at}:
            free.setdefault(shapes[found[place]], []).append(found[place])
        for name in PLACES:
            if getattr(step, name) >= 0:
                setattr(step, name, found[getattr(step, name)])
    program.widths, program.blocks = [width for width, _ in shapes], [block for _, block in shapes]


def places_of(step: Operation) -> list[int]:
    return [getattr(step, name) for name in PLACES if getattr(step, name) >= 0]
