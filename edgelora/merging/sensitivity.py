"""What an error of a layer's output costs: the mean squared gradient of the loss there, on the calibration rows.

To second order, and with the empirical Fisher information in place of the Hessian (SqueezeLLM, arXiv 2306.07629; its diagonal
alone), outputs that are off by e raise the loss by ½ Σ g² e².
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgelora import console

if TYPE_CHECKING:
    from edgelora.merging.calibration import Calibration

GRADIENT_BATCHES = 8


def gradients(model: Any, rows: Calibration) -> dict[str, Tensor]:
    """Return the mean square of the loss's gradient at each output `[N]` of every linear layer, by path.

    The loss is that of one row's supervised tokens together, over their number.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def listen(path: str, y: Tensor) -> None:
        def add(grad: Tensor) -> None:
            flat = grad.reshape(-1, grad.shape[-1])
            sums[path] = sums.get(path, 0) + flat.square().sum(0)
            counts[path] = counts.get(path, 0) + len(flat)

        if y.requires_grad:
            y.register_hook(add)  # type: ignore[no-untyped-call]

    hooks = [handle for path, layer in model.linears().items() for handle in hooked(layer, functools.partial(listen, path))]
    batches = rows.batches()
    step = max(1, len(batches) // GRADIENT_BATCHES)
    supervised = 0
    try:
        with torch.enable_grad(), started(model), console.progress("gradients", total=len(batches[::step])) as bar:
            for batch in batches[::step]:
                loss, items = rows.task.loss(model, batch)
                supervised += items
                loss.backward()  # type: ignore[no-untyped-call]
                bar.update(1)
    finally:
        for hook in hooks:
            hook.remove()
    # Of every supervised token's loss: ½ · Σ over tokens and outputs of g² e², over the supervised tokens.
    return {path: total / (2 * supervised) for path, total in sums.items()}


def hooked(layer: Any, listen: Callable[[Tensor], None]) -> list[Any]:
    """Listen to a layer's output. The hook before it keeps the layer out of products of several, where it is not called."""
    return [
        layer.register_forward_pre_hook(lambda *_: None),
        layer.register_forward_hook(lambda _module, _inputs, output: listen(output)),
    ]


@contextmanager
def started(model: Any) -> Iterator[None]:
    """Let gradients flow from the embedding on: nothing in a merged model is trained."""
    table = model.embed if hasattr(model, "embed") else model.network.get_input_embeddings()
    handle = table.register_forward_hook(lambda _module, _inputs, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()
