"""Which layers get more bits than the others.

The rule, for precision int4:

1. Embedding and LM head get 8 bits, whatever their error. Measured on SmolLM2 (E2E rows): blocks of 32 at 4 bits there cost
   0.11 of loss, at 8 bits nothing; a head in 8 bits is what the next token is read from, an embedding what every layer adds to.
2. A linear layer gets 8 bits if its relative error at 4 bits, ‖Q(W) - W‖ / ‖W‖ over the merged weight, is above
   `OUTLIER` × the median of all linear layers. Weights in blocks of 32 have 0.085 to 0.09 nearly everywhere (median 0.088 on
   MiniLM, 0.087 on SmolLM2); the few with heavy tails, attention layers mostly, go up to 0.104.
3. The layers of rule 2, worst first, stop where they would hold more than `LARGEST_SHARE` of the linear layers' weights.
4. q, k and v are one layer in this, gate and up another: with unlike bits they could not be one product on the device.

What it is worth, SmolLM2 untrained, 64 E2E rows (fp32 2.207, embedding 8 bits in all): all linears 4 bits 2.391, rules 2 and 3
(34 of 210 layers, 5% more bytes) 2.369, with rule 4 (36 layers, as many bytes, 15 products more packed) 2.372.

Precision int8 is 8 bits everywhere, fp32 none. int2 follows rules 2 and 3 with 2 bits, and 4 where they say 8; int3 gives 4
bits to the worse half of the weights and 2 to the others, 3 on average: no kernel packs 3.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

OUTLIER = 1.02
LARGEST_SHARE = 0.1

PRECISION_BITS: dict[str, int | None] = {"int2": 2, "int3": 2, "int4": 4, "int8": 8, "fp32": None}
"""The bits of most layers."""
MORE_BITS = {"int2": 4, "int3": 4, "int4": 8}
RAISED_SHARE = {"int2": LARGEST_SHARE, "int3": 0.5, "int4": LARGEST_SHARE}  # of the weights
PACKED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # layers of one input that export makes one product of


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
    sizes = {path: outputs * inputs for path, (outputs, inputs) in shapes.items()}
    groups = packed_groups(list(shapes))
    whole = {group: sum(sizes[path] for path in group) for group in groups}
    rough = {group: math.sqrt(sum(sizes[path] * errors[path] ** 2 for path in group) / whole[group]) for group in groups}
    limit = above * statistics.median(rough.values())
    room = share * sum(sizes.values())
    raised: list[str] = []
    for group in sorted(groups, key=lambda group: -rough[group]):
        room -= whole[group]
        if rough[group] <= limit or room < 0:
            break
        raised += group
    return raised


def packed_groups(paths: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the layers that are stored alike, as they are one product: q, k and v, gate and up, each other one alone."""
    groups: dict[tuple[str, int], list[str]] = {}
    for number, path in enumerate(paths):
        parent, _, name = path.rpartition(".")
        together = next((-1 - index for index, names in enumerate(PACKED) if name in names), number)
        groups.setdefault((parent, together), []).append(path)
    return [tuple(group) for group in groups.values()]
