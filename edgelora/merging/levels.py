"""Which layers keep float activations: `accuracy_level` 0 of MatMulNBits, where rounding them to int8 costs loss.

Measured, not guessed: if the loss on some calibration rows rises by more than TOLERANCE when every input is rounded as the
level 4 kernels do, layers get level 0, those first whose outputs suffer most, as few as bring the loss back below it. Level 0
has a fast kernel for 4 bits alone, and decodes at a third of the speed: at most LARGEST_SHARE of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgelora.export.reference import rounded_activations
from edgelora.models.linear import FrozenLinear
from edgelora.models.walk import listening
from edgelora.quant.grid import round_to_int8

if TYPE_CHECKING:
    from edgelora.merging.calibration import Calibration

TOLERANCE = 0.005  # relative rise of the loss
LARGEST_SHARE = 0.1  # of the quantized weights
ROWS = 32


@torch.no_grad()
def choose_levels(model: Any, rows: Calibration) -> tuple[dict[str, int], dict[str, float]]:
    """Return the levels that are not 4, by path, and the losses measured: float, int8, and int8 with these levels."""
    examples = rows.examples[:ROWS]
    losses = {"float": rows.loss(model, examples)}
    limit = losses["float"] * (1 + TOLERANCE)
    with rounded_activations(model):
        losses["int8"] = rows.loss(model, examples)
    if losses["int8"] <= limit:
        return {}, losses
    order = most_hurt(model, rows)
    low, high = 0, len(order)
    while low < high:  # the fewest that suffice, or all that may be
        middle = (low + high) // 2
        with rounded_activations(model, set(order[:middle])):
            found = rows.loss(model, examples)
        low, high = (low, middle) if found <= limit else (middle + 1, high)
    chosen = order[:high]
    with rounded_activations(model, set(chosen)):
        losses["int8 with levels"] = rows.loss(model, examples)
    if losses["int8 with levels"] >= losses["int8"]:
        return {}, losses
    return dict.fromkeys(chosen, 0), losses


def most_hurt(model: Any, rows: Calibration) -> list[str]:
    """Return the paths of 4-bit layers, those first whose outputs change most, up to LARGEST_SHARE of the weights."""
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear) and layer.quantized is not None]
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}

    def see(layer: FrozenLinear, x: Tensor) -> None:
        assert layer.quantized is not None
        flat = x.reshape(-1, x.shape[-1])
        weight = layer.weight.in_scratch()
        change = torch.nn.functional.linear(round_to_int8(flat, layer.quantized.block_size) - flat, weight)
        noise[layer.path] = noise.get(layer.path, 0.0) + float(change.square().sum())
        output = torch.nn.functional.linear(flat, weight)
        signal[layer.path] = signal.get(layer.path, 0.0) + float(output.square().sum())

    with listening(layers, see):
        rows.loss(model, rows.examples[: ROWS // 2])
    sizes = {layer.path: math.prod(layer.weight.shape) for layer in layers}
    narrow = [layer.path for layer in layers if layer.bits == 4 and signal.get(layer.path)]
    ranked = sorted(narrow, key=lambda path: -noise[path] / signal[path])
    return within_share(ranked, sizes)


def within_share(ranked: Sequence[str], sizes: dict[str, int]) -> list[str]:
    """Return the first paths that together have at most LARGEST_SHARE of the weights."""
    room = LARGEST_SHARE * sum(sizes.values())
    taken = []
    for path in ranked:
        room -= sizes[path]
        if room < 0:
            break
        taken.append(path)
    return taken
