"""A model block by block over fixed batches: each block's inputs are computed once, by the blocks before it as they are then.

This is what rounding layer by layer needs: a layer sees what the layers that are rounded already make of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from edgelora.models.attention import Context
from edgelora.models.decoder import Decoder, positions_of
from edgelora.models.network import Network

Layer = TypeVar("Layer", bound=nn.Module)
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward pass of which nothing more is wanted."""


class Walk(Protocol):
    """blocks: what is walked. calls: the arguments of the block that `blocks[i]` is called with, one entry for each batch."""

    blocks: list[nn.Module]

    def calls(self, index: int) -> list[Call]: ...


class DecoderWalk:
    """The blocks of a Decoder over packed documents. Memory: the hidden states `[T, H]` of all batches, once."""

    def __init__(self, model: Decoder, batches: Sequence[dict[str, Tensor]]) -> None:
        self.model = model
        self.blocks = list(model.blocks)
        self.batches = batches
        self._reached = 0
        contexts = [[int(start) for start in batch["starts"]] for batch in batches]
        self._contexts = [Context(bounds, positions_of(torch.tensor(bounds))) for bounds in contexts]
        self._hidden = [model.prefix(batch["ids"], batch["starts"], 0) for batch in batches]

    @torch.no_grad()
    def calls(self, index: int) -> list[Call]:
        while self._reached < index:
            block = self.blocks[self._reached]
            for i, context in enumerate(self._contexts):
                self._hidden[i] = block(self._hidden[i], context)
            self._reached += 1
        return [((hidden, context), {}) for hidden, context in zip(self._hidden, self._contexts, strict=True)]

    def heads(self) -> Iterator[Tensor]:
        """Yield the normed last hidden states at supervised positions of each batch, `[S, H]`: what the LM head reads."""
        for (hidden, _), batch in zip((call[0] for call in self.calls(len(self.blocks))), self.batches, strict=True):
            yield self.model.final_norm(hidden[batch["positions"]])


class NetworkWalk:
    """The layers of a Network, and last the whole network, for what lies outside of them.

    A layer's arguments are caught in a pass from the first layer on that ends there: they may differ from layer to layer.
    Batches must not be padded.
    """

    def __init__(self, model: Network, batches: Sequence[dict[str, Tensor]]) -> None:
        self.model = model
        self.blocks: list[nn.Module] = [*model._layers(), model.network]
        self.batches = [model.inputs_of(batch) for batch in batches]

    @torch.no_grad()
    def calls(self, index: int) -> list[Call]:
        if index == len(self.blocks) - 1:
            return [((), batch) for batch in self.batches]
        caught: list[Call] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args, kwargs))
            raise _Stop

        hook = self.blocks[index].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in self.batches:
                _until_stop(self.model.network, ((), batch))
        finally:
            hook.remove()
        return caught


def walk_through(model: Decoder | Network, batches: Sequence[dict[str, Tensor]]) -> Walk:
    return DecoderWalk(model, batches) if isinstance(model, Decoder) else NetworkWalk(model, batches)


@torch.no_grad()
def same_inputs(block: nn.Module, call: Call, layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return the paths of a block's `layers` in the order of their computation, those with one input together."""
    paths = {id(layer): path for path, layer in layers.items()}
    seen: list[tuple[str, Tensor]] = []
    with listening(list(layers.values()), lambda layer, x: seen.append((paths[id(layer)], x))):
        block(*call[0], **call[1])
    groups: list[list[str]] = []
    last: Tensor | None = None
    for path, x in seen:
        if last is not None and x.data_ptr() == last.data_ptr() and x.shape == last.shape:
            groups[-1].append(path)
        else:
            groups.append([path])
        last = x
    return groups


@torch.no_grad()
def see_inputs(block: nn.Module, calls: Sequence[Call], layer: nn.Module, see: Callable[[Tensor], object]) -> None:
    """Let `see` have a layer's inputs for every batch; what comes after the layer is not computed."""

    def stop(_: nn.Module, x: Tensor) -> None:
        see(x)
        raise _Stop

    with listening([layer], stop):
        for call in calls:
            _until_stop(block, call)


@contextmanager
def listening(layers: Sequence[Layer], see: Callable[[Layer, Tensor], object]) -> Iterator[None]:
    """Let `see` have each layer's input before the layer is computed."""

    def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
        see(layer, args[0])

    hooks = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _until_stop(module: nn.Module, call: Call) -> None:
    try:
        module(*call[0], **call[1])
    except _Stop:
        return
