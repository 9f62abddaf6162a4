"""Put adapters into a model: which layers, and the switch that turns them all off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from edgelora.adapters.lora import LoRA, LoRASettings
from edgelora.errors import SettingsError, did_you_mean

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.encoder import Encoder
    from edgelora.models.linear import FrozenLinear

ALL_LINEAR = "all-linear"


def choose_targets(paths: Sequence[str], wanted: str) -> list[str]:
    """Return those of the model's linear layers that `wanted` names, in the model's order.

    `wanted` is "all-linear", or names separated by commas; a name matches a layer's whole path or its end at a dot,
    as in PEFT. Raises SettingsError for every name that matches nothing.
    """
    if wanted.strip() == ALL_LINEAR:
        return list(paths)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if not any(matches(path, name) for path in paths)]
    if unknown or not names:
        known = suffixes(paths)
        lines = [f'"{name}" is no linear layer of this model.{did_you_mean(name, known)}' for name in unknown or [wanted]]
        raise SettingsError(
            "\n  ".join(["target modules: " + lines[0], *lines[1:]]) + f"\n  it has {', '.join(known)}",
            hint=f"--target-modules {ALL_LINEAR}",
        )
    return [path for path in paths if any(matches(path, name) for name in names)]


def matches(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def suffixes(paths: Iterable[str]) -> list[str]:
    """Return the distinct last parts of paths, in order."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def attach(model: Decoder | Encoder, settings: LoRASettings, targets: str) -> dict[str, LoRA]:
    """Put a new adapter on each target layer; return them by path."""
    linears = frozen_linears(model)
    added = {}
    for path in choose_targets(list(linears), targets):
        added[path] = LoRA.from_base(linears[path], settings)
        model.replace_linear(path, added[path])
    return added


def frozen_linears(model: Decoder | Encoder) -> dict[str, FrozenLinear]:
    """Return the layers that have no adapter yet, by path, in the model's order."""
    from edgelora.models.linear import FrozenLinear

    return {path: layer for path, layer in model.linears().items() if isinstance(layer, FrozenLinear)}


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """Return the adapters of a model by path, in the model's order."""
    return {module.path: module for module in model.modules() if isinstance(module, LoRA)}


def put_on_grid(model: nn.Module, grid: dict[str, Any]) -> None:
    """Let every adapter compute with the rounded weights that ship; `grid` is what the run's manifest records."""
    for path, adapter in adapters(model).items():
        adapter.grid = (int(grid["bits"][path]), int(grid["block_size"]))


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute as if it had no adapters."""
    found = list(adapters(model).values())
    for adapter in found:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.enabled = True
