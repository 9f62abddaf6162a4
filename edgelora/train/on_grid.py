"""On-grid training: adapted layers compute with the rounded weights that will ship (LR-QAT, arXiv 2406.06385).

Which layers get how many bits is decided before the first step, by the rule that `merge` has (`quant/bits.py`), and recorded
in the run, so that merging rounds onto the grid that was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edgelora import memory
from edgelora.adapters.inject import adapters
from edgelora.adapters.learned_scales import LearnedScales
from edgelora.adapters.lora import LoRA
from edgelora.errors import FolderError, ModelError
from edgelora.models.linear import FrozenLinear
from edgelora.models.stream import in_turn
from edgelora.models.weights import Entry, file_entries, read_entry
from edgelora.quant.bits import PRECISION_BITS, choose_bits, error_bits
from edgelora.quant.grid import QuantizedTensor
from edgelora.quant.measure import relative_error
from edgelora.train.start import write

if TYPE_CHECKING:
    from edgelora.config import FinetuneConfig
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network

BLOCK_SIZE = 32
ROUNDED = "rounded.safetensors"
STARTS = ("nearest", "calibrated")  # without and with a start of its own (train/start.py)
SCALES = ("max", "learned")
LEAST_BASE_BITS = 8  # a base kept in 4 bits is rounded already: W0, which the merge rounds, is not known any more


def applies(config: FinetuneConfig, base_bits: int) -> bool:
    """Tell whether a run trains on the grid.

    Not with DoRA or dropout, which have no form in weight space with a straight-through gradient here.
    """
    rounds = config.method == "lora" and bool(PRECISION_BITS[config.precision]) and base_bits >= LEAST_BASE_BITS
    return rounds and not config.dora and not config.dropout


def starts_apart(config: FinetuneConfig, *, plain: bool) -> bool:
    """Tell whether what is rounded begins as something else than the frozen weights, beside which it is kept (train/start.py).

    plain: where the user has not said, it does not. Never where most layers have 8 bits: there is nothing to make up for.
    """
    wanted = not plain if config.grid_start is None else config.grid_start == STARTS[True]
    return wanted and error_bits(config.precision) is not None


def learns_scales(config: FinetuneConfig, *, plain: bool) -> bool:
    """Tell whether block scales are learned beside the adapters; `plain` and 8 bits as with `starts_apart`."""
    wanted = not plain if config.grid_scales is None else config.grid_scales == SCALES[True]
    return wanted and error_bits(config.precision) is not None


def choose_grid(model: Decoder | Network, config: FinetuneConfig) -> dict[str, Any]:
    """Return what the manifest records beside the plan's part: precision, block size, the bits of each linear layer by path."""
    linears = {path: frozen(layer) for path, layer in model.linears().items()}
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in linears.items()}
    errors = {}
    if (few := error_bits(config.precision)) is not None:
        errors = {path: relative_error(layer.weight_fp32(), few, BLOCK_SIZE) for path, layer in linears.items()}
    bits = choose_bits(config.precision, shapes, errors, ())
    grid = {"precision": config.precision, "block_size": BLOCK_SIZE, "bits": bits}
    return {**grid, "activations": config.grid_activations, "warmup": config.grid_warmup}


@contextmanager
def warming_up(model: nn.Module, step: int, num_steps: int, share: float) -> Iterator[None]:
    """Let the adapters compute without rounding if `step` is among the first `share` of the steps."""
    found = list(adapters(model).values())
    for adapter in found:
        adapter.unrounded = step < round(share * num_steps)
    try:
        yield
    finally:
        for adapter in found:
            adapter.unrounded = False


def round_all(model: nn.Module) -> None:
    """Round every adapter on the grid, before the first step does: what stays from step to step would lie between temporaries,
    and hold the heap open there. Streamed blocks are dropped again after it."""
    for adapter in adapters(model).values():
        adapter.make_room()
    for block in in_turn(model):
        for adapter in adapters(block).values():
            if adapter.grid is not None:
                adapter.rounded()
    memory.trim()


def learned_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained logarithms of block scales by path: none where scales follow from the weights."""
    found = {path: adapter.log_scales for path, adapter in adapters(model).items()}
    return {path: scales for path, scales in found.items() if scales is not None}


def save_rounded(model: nn.Module, run: Path) -> None:
    """Write the adapted layers as they ship into a run folder: `<path>.codes` and `<path>.scales` as in a merged folder, and
    what block scales were multiplied by."""
    rounded = {path: adapter.rounded() for path, adapter in adapters(model).items() if adapter.grid is not None}
    if rounded:
        write(run / f".{ROUNDED}.partial", rounded)
        (run / f".{ROUNDED}.partial").replace(run / ROUNDED)
    if learned := learned_scales(model):
        LearnedScales(learned, next(iter(adapters(model)[path].scale_block for path in learned))).save(run)


@dataclass(frozen=True)
class RoundedLayers:
    """The adapted layers of a run as training computed with them last: what ships, whatever has become of the base since."""

    grid: dict[str, Any]
    entries: dict[str, Entry]

    @classmethod
    def open(cls, run: Path, grid: dict[str, Any]) -> RoundedLayers:
        """Raises FolderError if the run's file is missing or damaged."""
        try:
            return cls(grid, file_entries(run / ROUNDED))
        except ModelError as error:
            raise FolderError(error.message, hint="train again with --overwrite") from None

    def __contains__(self, path: str) -> bool:
        return f"{path}.codes" in self.entries

    def tensor(self, path: str, num_inputs: int) -> QuantizedTensor:
        """Return the layer at `path`, mapped from the file."""
        codes, scales = (read_entry(self.entries[f"{path}.{part}"]) for part in ("codes", "scales"))
        return QuantizedTensor(codes, scales, int(self.grid["bits"][path]), int(self.grid["block_size"]), num_inputs)


def ship(model: nn.Module, run: Path, grid: dict[str, Any]) -> None:
    """Let the adapters of a run that is over compute with what ships."""
    found = {path: adapter for path, adapter in adapters(model).items() if adapter.grid is not None}
    if not found:
        return
    rounded = RoundedLayers.open(run, grid)
    for path, adapter in found.items():
        if path in rounded:
            adapter.ship(rounded.tensor(path, adapter.in_features))


def frozen(layer: nn.Module) -> FrozenLinear:
    """Return the frozen layer itself, or the one under an adapter."""
    inner = layer.base if isinstance(layer, LoRA) else layer
    assert isinstance(inner, FrozenLinear)
    return inner
