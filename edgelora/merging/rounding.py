"""Rounding a merged model onto the grid with the user's rows: layer by layer, each seeing what the rounded ones before it give.

Layers that read the same input (q, k and v; gate and up) share its second moments. Memory: the model's blocks one at a time in
fp32, the rounded ones, the rows' hidden states, and one Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgelora.models.linear import FrozenEmbedding, FrozenLinear, FrozenWeight
from edgelora.models.walk import Walk, same_inputs, see_inputs
from edgelora.quant.bits import Choice
from edgelora.quant.calibrate import Moments
from edgelora.quant.clip import round_clipped
from edgelora.quant.gptq import gptq
from edgelora.quant.grid import QuantizedTensor, dequantize, quantize

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network

    Model = Decoder | Network

METHODS = ("gptq", "clip", "nearest")
Weights = Callable[[str], Tensor]  # path → the merged weight [N, K], fp32


@dataclass(frozen=True)
class Rounded:
    """A layer, rounded. group: the first of the layers with its input. error_N: the mean squared error of each output on the
    rows. whole: by the whole Hessian."""

    path: str
    group: str
    tensor: QuantizedTensor
    error_N: Tensor
    whole: bool


@torch.no_grad()
def round_model(
    model: Model, walk: Walk, weight: Weights, choices: Callable[[str], Sequence[Choice]], method: str = "gptq"
) -> Iterator[list[Rounded]]:
    """Round the model's linear layers in place, in the order of computation; yield a layer's results, one for each choice.

    The model goes on with the first choice.
    """
    done: set[str] = set()
    for index, block in enumerate(walk.blocks):
        inside = {module.path for module in block.modules() if isinstance(module, FrozenLinear)} - done
        if not inside:
            continue
        calls = walk.calls(index)
        for path in inside:
            put(model, path, weight(path))
        layers = {module.path: module for module in block.modules() if isinstance(module, FrozenLinear)}
        for group in same_inputs(block, calls[0], layers):
            paths = [path for path in group if path in inside]
            if not paths:
                continue
            moments = Moments(weight(paths[0]).shape[1])
            see_inputs(block, calls, layers[paths[0]], moments.add)
            for path, results in round_group(paths, weight, moments, choices, method):
                put(model, path, results[0].tensor)
                yield results
            done.update(paths)


def round_group(
    paths: Sequence[str], weight: Weights, moments: Moments, choices: Callable[[str], Sequence[Choice]], method: str
) -> Iterator[tuple[str, list[Rounded]]]:
    """Round layers with the same input, each by its choices."""
    factor = moments.factor() if method == "gptq" and moments.whole else None
    for path in paths:
        weight_NK, results = weight(path), []
        for choice in choices(path):
            if factor is not None:
                tensor = gptq(weight_NK, factor, choice.bits, choice.block_size)[0]
            elif method == "nearest":
                tensor = quantize(weight_NK, choice.bits, choice.block_size)
            else:
                tensor = round_clipped(weight_NK, choice.bits, choice.block_size, moments.importance())
            change = dequantize(tensor) - weight_NK
            results.append(Rounded(path, paths[0], tensor, moments.output_error(change), factor is not None))
        yield path, results


def put(model: Model, path: str, weight: Tensor | QuantizedTensor) -> None:
    """Let the linear layer or the table at `path` compute with this weight."""
    layer = model.linears().get(path)
    if layer is not None:
        assert isinstance(layer, FrozenLinear)
        model.replace_linear(path, FrozenLinear(path, FrozenWeight(weight), layer.bias))
        return
    for module in model.modules():
        if isinstance(module, FrozenEmbedding) and module.path == path:
            module.weight.data = weight  # a tied head reads the same FrozenWeight
            return
    head = getattr(model, "head", None)
    if head is not None:  # an LM head of its own
        head.weight.data = weight
        return
    table = model.get_submodule(f"network.{path}")
    full = dequantize(weight) if isinstance(weight, QuantizedTensor) else weight
    table.weight = nn.Parameter(full.clone(), requires_grad=False)


def put_all(model: Model, tensors: Mapping[str, QuantizedTensor]) -> None:
    for path, tensor in tensors.items():
        put(model, path, tensor)
