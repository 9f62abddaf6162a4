"""On-grid training: adapted layers compute with the rounded weights that will ship (LR-QAT, arXiv 2406.06385).

Which layers get how many bits is decided before the first step, by the rule that `merge` has (`quant/bits.py`), and recorded
in the run, so that merging rounds onto the grid that was trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from edgelora.adapters.lora import LoRA
from edgelora.models.linear import FrozenLinear
from edgelora.quant.bits import PRECISION_BITS, choose_bits
from edgelora.quant.measure import relative_error

if TYPE_CHECKING:
    from edgelora.config import FinetuneConfig
    from edgelora.models.decoder import Decoder
    from edgelora.models.encoder import Encoder

BLOCK_SIZE = 32
LEAST_BASE_BITS = 8  # a base kept in 4 bits is rounded already: W0, which the merge rounds, is not known any more


def applies(config: FinetuneConfig, base_bits: int) -> bool:
    """Tell whether a run trains on the grid.

    Not with DoRA or dropout, which have no form in weight space with a straight-through gradient here.
    """
    rounds = config.method == "lora" and bool(PRECISION_BITS[config.precision]) and base_bits >= LEAST_BASE_BITS
    return rounds and not config.dora and not config.dropout


def choose_grid(model: Decoder | Encoder, config: FinetuneConfig) -> dict[str, Any]:
    """Return what the manifest records: precision, block size and the bits of every linear layer by path."""
    linears = {path: frozen(layer) for path, layer in model.linears().items()}
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in linears.items()}
    errors = {}
    if PRECISION_BITS[config.precision] == 4:
        errors = {path: relative_error(layer.weight_fp32(), 4, BLOCK_SIZE) for path, layer in linears.items()}
    bits = choose_bits(config.precision, shapes, errors, ())
    return {"precision": config.precision, "block_size": BLOCK_SIZE, "bits": bits}


def frozen(layer: nn.Module) -> FrozenLinear:
    """Return the frozen layer itself, or the one under an adapter."""
    inner = layer.base if isinstance(layer, LoRA) else layer
    assert isinstance(inner, FrozenLinear)
    return inner
