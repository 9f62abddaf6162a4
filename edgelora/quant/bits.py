"""Which layers get more bits than the others.

The rule, for precision int4:

1. Embedding and LM head get 8 bits, whatever their error. Measured on SmolLM2 (E2E rows): blocks of 32 at 4 bits there cost
   0.11 of loss, at 8 bits nothing; a head in 8 bits is what the next token is read from, an embedding what every layer adds to.
2. A linear layer gets 8 bits if its relative error at 4 bits, ‖Q(W) - W‖ / ‖W‖ over the merged weight, is above
   `OUTLIER` × the median of all linear layers. Weights in blocks of 32 have 0.085 to 0.09 nearly everywhere (median 0.088 on
   MiniLM, 0.087 on SmolLM2); the few with heavy tails, attention layers mostly, go up to 0.104.
3. The layers of rule 2, worst first, stop where they would hold more than `LARGEST_SHARE` of the linear layers' weights.

What it is worth, SmolLM2 untrained, 64 E2E rows (fp32 2.810, embedding 8 bits in all): all linears 4 bits 3.023, those above
1.15 × (2 of 210 layers) 3.017, those above 1.02 × up to a tenth of the weights (34 layers, 5% more bytes) 2.949.

Precision int8 is 8 bits everywhere, fp32 none. int2 follows rules 2 and 3 with 2 bits, and 4 where they say 8; int3 gives 4
bits to the worse half of the weights and 2 to the others, 3 on average: no kernel packs 3.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass

OUTLIER = 1.02
LARGEST_SHARE = 0.1

PRECISION_BITS: dict[str, int | None] = {"int2": 2, "int3": 2, "int4": 4, "int8": 8, "fp32": None}
"""The bits of most layers."""
MORE_BITS = {"int2": 4, "int3": 4, "int4": 8}
RAISED_SHARE = {"int2": LARGEST_SHARE, "int3": 0.5, "int4": LARGEST_SHARE}  # of the weights


@dataclass(frozen=True)
class Choice:
    """How a layer is stored."""

    bits: int
    block_size: int

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Return the bytes of codes and scales; blocks are whole."""
        return num_outputs * -(-num_inputs // self.block_size) * (self.block_size * self.bits // 8 + 4)


def choose_bits(
    precision: str, shapes: Mapping[str, tuple[int, int]], errors: Mapping[str, float], keep_8: Collection[str]
) -> dict[str, int]:
    """Return the bits of each layer path of `shapes`; an empty dict means that nothing is quantized.

    errors: relative error of the linear layers at the bits of most. keep_8: the paths of embedding and LM head (rule 1).
    """
    bits = PRECISION_BITS[precision]
    if bits is None or bits == 8:
        return {} if bits is None else dict.fromkeys(shapes, bits)
    linears = {path: shape for path, shape in shapes.items() if path not in keep_8}
    limit = OUTLIER if precision != "int3" else 0.0
    raised = outliers(linears, errors, RAISED_SHARE[precision], limit)
    return {**dict.fromkeys(shapes, bits), **dict.fromkeys(raised, MORE_BITS[precision]), **dict.fromkeys(keep_8, 8)}


def error_bits(precision: str) -> int | None:
    """Return the bits at which `choose_bits` wants the errors of linear layers, None where it does without."""
    bits = PRECISION_BITS[precision]
    return bits if bits is not None and bits < 8 else None


def outliers(
    shapes: Mapping[str, tuple[int, int]], errors: Mapping[str, float], share: float = LARGEST_SHARE, above: float = OUTLIER
) -> list[str]:
    """Return the paths that rules 2 and 3 raise, worst error first: up to `share` of the weights, `above` × the median."""
    if not shapes:
        return []
    limit = above * statistics.median(errors[path] for path in shapes)
    room = share * sum(outputs * inputs for outputs, inputs in shapes.values())
    raised = []
    for path in sorted(shapes, key=lambda path: -errors[path]):
        outputs, inputs = shapes[path]
        room -= outputs * inputs
        if errors[path] <= limit or room < 0:
            break
        raised.append(path)
    return raised
