"""The shape of a network whose costs no config tells: computed once without memory, its tensors counted."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgelora.planning.shape import ModelShape

if TYPE_CHECKING:
    from edgelora.models.source import ModelSource
    from edgelora.tasks.base import Task

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
KEEPS_NOTHING = (nn.Dropout, nn.Identity, nn.Flatten)


def network_shape(source: ModelSource, task: Task) -> ModelShape:
    """Return the widths of an encoder that keeps as many values per unit of length as the network does in one forward pass.

    Counted are what every layer with a weight, norm and activation is given. Where its layers are not a list of equals, all of
    it is one layer. Time is corrected by the probe.
    """
    from edgelora.models.build import build_network
    from edgelora.models.network import Network
    from edgelora.models.parts import Parts, within_attention

    network = build_network(source.config, task.auto_class).eval()
    processor = task.open_processor(source.folder)
    example = task.trial_examples(processor)[:1]
    wanted = [tensor.name for tensor in task.inputs(source.config, inspect.signature(network.forward).parameters)]
    # Of a mask the values would be looked at, which are nowhere
    batch = {name: torch.from_numpy(task.collate(example, processor)[name]) for name in wanted if name != "attention_mask"}
    if "pixel_mask" in inspect.signature(network.forward).parameters:  # whose values are looked at
        seen = count(network._apply(lambda tensor: torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor), batch)
    else:
        seen = count(network.to("meta"), {name: tensor.to("meta") for name, tensor in batch.items()})
    length = max(1, len(example[0]))
    parts = Parts.of(network, task)
    inside = {path: module for path, module in network.named_modules() if not parts.in_head(path)}
    layers = max(1, len(Network(network, (), ())._layers()))
    weighted = [
        (path, module.weight.shape[0], module.weight[0].numel())
        for path, module in inside.items()
        if isinstance(module, WEIGHTED) and not within_attention(module)
    ]
    widest = max(seen.values()) // length
    kept = sum(seen.values()) // length // layers
    hidden = max(1, min(widest, kept // 8))
    inner = max(1, min(widest, (kept - 5 * hidden) // 2))
    queries = max(1, (kept - 5 * hidden - 2 * inner) // 3)
    heads = source.config.get("num_attention_heads")
    return ModelShape(
        encoder=True,
        layers=layers,
        hidden=hidden,
        inner=inner,
        queries=queries,
        keys=queries,
        vocab=0,
        gated=False,
        linears=tuple(weighted),
        tables=(),
        merged_bytes=None,
        scored_heads=heads
        if isinstance(heads, int) and float(source.config.get("attention_probs_dropout_prob") or 0) > 0
        else 0,
        convolutions=frozenset(path for path, module in inside.items() if isinstance(module, nn.Conv1d | nn.Conv2d)),
        waves=any(tensor.ndim == 2 and tensor.is_floating_point() for tensor in batch.values()),
    )


def count(network: nn.Module, batch: dict[str, Tensor]) -> dict[int, int]:
    """Return the values of each tensor that a module without children is given, of those that keep it for backward."""
    from edgelora.models.network import Network

    seen: dict[int, int] = {}
    held: list[Tensor] = []  # so that no number is used again

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            held.append(args[0])
            seen[id(args[0])] = args[0].numel()

    leaves = [m for m in network.modules() if not isinstance(m, KEEPS_NOTHING) and next(m.children(), None) is None]
    hooks = [module.register_forward_pre_hook(see) for module in leaves]
    try:
        with torch.no_grad():
            Network(network, (), ()).outputs(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
