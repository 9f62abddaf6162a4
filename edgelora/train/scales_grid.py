"""Scales-only training: the grid that a run's integers are on, and what it keeps of its best step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapters import scales
from edgelora.errors import ModelError, SettingsError
from edgelora.models.linear import FrozenLinear
from edgelora.models.stream import in_turn
from edgelora.quant.bits import PRECISION_BITS, choose_bits, error_bits
from edgelora.quant.grid import QuantizedTensor
from edgelora.quant.measure import relative_error
from edgelora.scales_delta import FILE, codes_digest, read_delta, write_delta

if TYPE_CHECKING:
    from edgelora.config import FinetuneConfig
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network
    from edgelora.models.source import ModelSource
    from edgelora.train.run import Run

    Model = Decoder | Network

BLOCK_SIZE = 32
BASE_BITS = (4, 8)  # that frozen weights are kept in


def trains_scales(config: FinetuneConfig) -> bool:
    return config.method == "scales"


def refuse_settings(config: FinetuneConfig) -> None:
    """Raise SettingsError that lists the settings which scales-only training has no use for."""
    if not trains_scales(config):
        return
    default = type(config)()
    names: tuple[str, ...] = (
        "rank",
        "alpha",
        "dropout",
        "rslora",
        "dora",
        "init",
        "loraplus_ratio",
        "rank_pattern",
        "alpha_pattern",
    )
    names += ("grid_start", "grid_scales")
    problems = [f"{name} is for adapters" for name in names if getattr(config, name) != getattr(default, name)]
    bits = PRECISION_BITS[config.precision]
    if bits not in BASE_BITS:
        problems.append(f"precision {config.precision} has no block scales; allowed: int4, int8")
    elif config.base_bits not in (None, bits):
        problems.append(f"base_bits is {config.base_bits}; the integers that ship at {config.precision} have {bits}")
    if problems:
        raise SettingsError(
            "\n  ".join(['settings that do not go with method "scales":', *problems]), hint="leave them out, or --method lora"
        )


def choose_grid(source: ModelSource, task: str, config: FinetuneConfig) -> dict[str, Any]:
    """Return what the manifest records: precision, block size and the bits of every linear layer by path, as `merge` chooses
    them for the base alone; of a merged folder those it has. Reads one weight at a time.

    Raises ModelError for a merged folder that is not on a grid, SettingsError for one of another precision.
    """
    from edgelora.models.tensors import model_layout

    layout = model_layout(source.config, task)
    names = set(source.names())
    paths = [path for path in layout.linears if f"{path}.weight" in names]
    shapes: dict[str, tuple[int, int]] = {}
    errors: dict[str, float] = {}
    given: dict[str, int] = {}
    for path in paths:
        weight = source.read_linear(path, transposed=layout.transposed)
        shapes[path] = weight.shape[0], weight.shape[1]
        if isinstance(weight, QuantizedTensor):
            given[path] = weight.bits
        elif (few := error_bits(config.precision)) is not None:
            errors[path] = relative_error(weight, few, BLOCK_SIZE)
    made = source.merged.manifest.get("precision", config.precision) if source.merged is not None else config.precision
    if made != config.precision:
        raise SettingsError(f"{source.reference} was merged to {made}, not {config.precision}", hint=f"--precision {made}")
    if given and len(given) < len(paths):
        bare = next(path for path in paths if path not in given)
        raise ModelError(f"{source.reference} has no integers for {bare}", hint="merge it to int4 or int8")
    bits = given or choose_bits(config.precision, shapes, errors, ())
    return {"precision": config.precision, "block_size": BLOCK_SIZE, "bits": bits}


def code_digests(model: Model) -> dict[str, str]:
    """Return the sha256 of each linear layer's codes by path; streamed blocks are dropped again after it."""
    found: dict[str, str] = {}
    for block in in_turn(model):
        for layer in block.modules():
            if isinstance(layer, FrozenLinear) and layer.quantized is not None:
                grid = layer.quantized
                found[layer.path] = codes_digest(grid.codes.numpy(), grid.bits, grid.block_size)
    return found


def keep(model: Model, run: Run, folder: Path) -> None:
    """Write the scales as they are now: the best so far."""
    write_delta(folder / FILE, scales.delta_of(model, run.grid["codes"], run.model["reference"]))


def apply_kept(model: Model, folder: Path) -> None:
    """Put the kept scales into the model."""
    scales.apply(model, read_delta(folder))
