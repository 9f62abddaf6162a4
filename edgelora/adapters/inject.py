"""Put adapters into a model: which layers, and the switch that turns them all off."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from edgelora.adapters.initialize import from_pattern
from edgelora.adapters.lora import LoRA, LoRASettings
from edgelora.errors import SettingsError, did_you_mean
from edgelora.quant.grid import QuantizedTensor

if TYPE_CHECKING:
    from edgelora.models.convolution import FrozenConv
    from edgelora.models.decoder import Decoder
    from edgelora.models.linear import FrozenLinear
    from edgelora.models.network import Network

ALL_LINEAR = "all-linear"
NO_LAYER = "none"  # the head alone is trained


def choose_targets(paths: Sequence[str], wanted: str, convolutions: Container[str] = ()) -> list[str]:
    """Return those of the model's layers that `wanted` names, in the model's order.

    `wanted` is "all-linear", which of a network without linear layers means its `convolutions`, "none", or names separated by
    commas; a name matches a layer's whole path or its end at a dot, as in PEFT. Raises SettingsError for every name that
    matches nothing.
    """
    if wanted.strip() == NO_LAYER:
        return []
    if wanted.strip() == ALL_LINEAR:
        return [path for path in paths if path not in convolutions] or list(paths)
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


def attach(model: Decoder | Network, settings: LoRASettings, targets: str) -> dict[str, LoRA]:
    """Put a new adapter on each target layer; return them by path.

    Raises SettingsError for targets and patterns that match no layer, and for ranks that a layer is too small for.
    """
    layers, convolutions = frozen_layers(model), frozen_convolutions(model)
    paths = choose_targets(list(layers), targets, convolutions)
    if not paths and not dict(getattr(model, "head_parameters", dict)()):
        raise SettingsError(
            "without target modules nothing is trained: this task has no head", hint=f"--target-modules {ALL_LINEAR}"
        )
    shapes = {path: (layers[path].out_features, layers[path].in_features) for path in paths}
    refuse_settings(settings, shapes, [path for path in paths if path in convolutions])
    added = {}
    for path in paths:
        added[path] = LoRA.from_base(layers[path], settings)
        model.replace_linear(path, added[path])
    return added


def refuse_settings(settings: LoRASettings, shapes: dict[str, tuple[int, int]], convolutions: Sequence[str] = ()) -> None:
    """Raise SettingsError for what does not fit the target layers, whose (outputs, inputs) are given by path."""
    asked = {"dora": settings.dora, "dropout": bool(settings.dropout), 'init = "eva"': settings.init == "eva"}
    unfit = [name for name, set_ in asked.items() if set_ and convolutions]
    problems = [f"{name} is for linear layers; {convolutions[0]} is a convolution" for name in unfit]
    for name, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        unused = [key for key in patterns if not any(from_pattern({key: True}, path, False) for path in shapes)]
        problems += [f'{name} "{key}" is the end of no target layer\'s name' for key in unused]
    for path, (outputs, inputs) in shapes.items():
        # These begin with r directions of the weight, or of its inputs.
        limit = {"pissa": min(outputs, inputs), "olora": min(outputs, inputs), "eva": inputs}.get(settings.init, math.inf)
        if settings.rank_of(path) > limit:
            problems.append(f'init = "{settings.init}" at rank {settings.rank_of(path)}: {path} has but {limit} directions')
    if problems:
        shown = [*problems[:10], *([f"and {len(problems) - 10} more"] if len(problems) > 10 else [])]
        raise SettingsError(
            "\n  ".join(["the adapters do not fit the model:", *shown]), hint=f"it has {', '.join(suffixes(shapes))}"
        )


def initial_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return, by name, what adapters are a difference to and a checkpoint must hold: A0 and B0 of PiSSA and OLoRA."""
    pairs = {path: adapter.initial for path, adapter in adapters(model).items() if adapter.initial is not None}
    return {f"{path}.initial_{name}": pair[i] for path, pair in pairs.items() for i, name in enumerate("AB")}


def frozen_layers(model: Decoder | Network) -> dict[str, FrozenLinear | FrozenConv]:
    """Return the linear layers and convolutions that have no adapter yet, by path, linear layers first."""
    return {**frozen_linears(model), **frozen_convolutions(model)}


def frozen_convolutions(model: Decoder | Network) -> dict[str, FrozenConv]:
    """Return the convolutions that have no adapter yet, by path; a decoder has none."""
    from edgelora.models.convolution import FrozenConv

    found: dict[str, nn.Module] = getattr(model, "convolutions", dict)()
    return {path: layer for path, layer in found.items() if isinstance(layer, FrozenConv)}


def adaptable(model: Decoder | Network) -> list[str]:
    """Return the paths of all layers that have or may have an adapter, linear layers first."""
    return [*model.linears(), *getattr(model, "convolutions", dict)()]


def frozen_linears(model: Decoder | Network) -> dict[str, FrozenLinear]:
    """Return the layers that have no adapter yet, by path, in the model's order."""
    from edgelora.models.linear import FrozenLinear

    return {path: layer for path, layer in model.linears().items() if isinstance(layer, FrozenLinear)}


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """Return the adapters of a model by path, in the model's order."""
    return {module.path: module for module in model.modules() if isinstance(module, LoRA)}


def put_on_grid(model: nn.Module, grid: dict[str, Any]) -> None:
    """Let every adapter compute with the rounded weights that ship; `grid` is what the run's manifest records."""
    for path, adapter in adapters(model).items():
        if path not in grid["bits"]:  # a convolution, which ships as it is
            continue
        adapter.grid = (int(grid["bits"][path]), int(grid["block_size"]))
        adapter.input_block = adapter.grid[1] if grid.get("activations") == "int8" else 0
        if grid.get("scales") != "learned" or adapter.grid[0] == 8:
            adapter.log_scales = None
        elif adapter.log_scales is None:  # a run's own may be there already
            adapter.learn_scales(adapter.grid[1])


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute as if it had no adapters, and its base's scales."""
    from edgelora.adapters.scales import BlockScales, scaled_layers

    found: list[LoRA | BlockScales] = [*adapters(model).values(), *scaled_layers(model).values()]
    for adapter in found:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.enabled = True


@contextmanager
def off_grid(model: nn.Module) -> Iterator[None]:
    """Let every adapter compute without rounding: the adapter in fp32, on the frozen weights as they are stored."""
    grids = {adapter: adapter.grid for adapter in adapters(model).values()}
    for adapter in grids:
        adapter.grid = None
    try:
        yield
    finally:
        for adapter, grid in grids.items():
            adapter.grid = grid


def rounded_layers(model: nn.Module, grid: dict[str, Any]) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield (path, tensor) of the layers and tables that compute with what ships: those on the grid that the run records."""
    from edgelora.models.linear import FrozenEmbedding

    layers = {path: layer.weight_data() for path, layer in getattr(model, "linears", dict)().items()}
    layers |= {module.path: module.weight.data for module in model.modules() if isinstance(module, FrozenEmbedding)}
    for path, data in layers.items():
        wanted = (int(grid["bits"].get(path, 8)), int(grid["block_size"]))
        if isinstance(data, QuantizedTensor) and (data.bits, data.block_size) == wanted:
            yield path, data
