"""Scales-only training (PEQA, arXiv 2305.14152): a layer's codes stay as they are, the scales of its blocks are trained.

    w = (q - z) · s        s = bf16(s0 · (1 + c))        ds/dc = s0

c `[N, blocks]` begins at zero, so that one learning rate suits blocks of every size and weight decay leads back to the base.
The rounding to bf16 is the grid's own; its gradient is taken as 1 (straight through). No other weight than the codes is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgelora.adapters import peft_format
from edgelora.adapters.inject import choose_targets, frozen_linears
from edgelora.adapters.peft_config import CONFIG
from edgelora.adapters.peft_format import AdapterFile, head_parameters
from edgelora.errors import FolderError
from edgelora.models.linear import FrozenLinear, FrozenWeight
from edgelora.models.linear_group import LinearGroup, linears
from edgelora.models.scale_gradient import of_codes, scale_gradient
from edgelora.quant.grid import QuantizedTensor
from edgelora.scales_delta import FILE, Delta, read_delta

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network

    Model = Decoder | Network

# Learning rate of c as a multiple of an adapter's. SmolLM2, 60 steps on E2E rows, mean training loss of steps 7 to 13 and 13 to
# 25: rate 2e-3 1.729; 4e-3 1.655 and 1.411; 1e-2 1.713 and 1.484; 2e-2 worse from the first steps on.
RATE = 4.0


class BlockScales(nn.Module):
    """A layer on the grid whose block scales are trained. `enabled = False` gives the base layer's output."""

    input_block = 0  # an input is taken as it is

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        assert base.quantized is not None, f"{base.path} is not on the grid"
        self.base = base
        self.path = base.path
        self.enabled = True
        self.change = nn.Parameter(torch.zeros(base.quantized.scales.shape))
        self._alone: LinearGroup | None = None

    @property
    def fixed(self) -> QuantizedTensor:
        """The base's codes and scales."""
        assert self.base.quantized is not None
        return self.base.quantized

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., K]` to `[..., N]`. While somebody listens to the input, the scales get no gradient."""
        if not self.enabled:
            plain: Tensor = self.base(x)
            return plain
        if not self.in_weight_space:
            fixed: Tensor = FrozenLinear(self.path, FrozenWeight(self.weight_data()), self.base.bias)(x)
            return fixed
        self._alone = self._alone or LinearGroup([self])
        return linears(x.reshape(-1, x.shape[-1]), self._alone).view(*x.shape[:-1], -1)

    @property
    def frozen(self) -> FrozenLinear:
        """The frozen layer (linear_group.Member)."""
        return self.base

    @property
    def in_weight_space(self) -> bool:
        return not self._forward_pre_hooks

    @property
    def apart(self) -> bool:
        """Whether the frozen weight is used as it is stored: when switched off."""
        return not self.enabled

    def trained(self) -> None:
        """Return the factors: there are none."""

    def scaled(self) -> Tensor | None:
        return self.change if self.enabled else None

    def weight_data(self) -> QuantizedTensor:
        """Return the base's codes with the scales as they are now."""
        fixed = self.fixed
        return dataclasses.replace(fixed, scales=self.scales()) if self.enabled else fixed

    def scale_gradient(self, grad_TN: Tensor, h_TK: Tensor) -> Tensor:
        fixed = self.fixed
        return scale_gradient(grad_TN, h_TK, fixed.block_size, of_codes(fixed)).mul_(fixed.scales)

    @torch.no_grad()
    def scales(self) -> Tensor:
        """Return bf16(s0 · (1 + c)), fp32 `[N, blocks]`. Made at every use: kept, they would take as much again as c."""
        start = self.fixed.scales
        return torch.addcmul(start, start, self.change).bfloat16().float()

    @torch.no_grad()
    def set_scales(self, scales: Tensor) -> None:
        """Let `scales` be this layer's from now on. Raises FolderError for another shape, or where s0 = 0 cannot give them."""
        start = self.fixed.scales
        if scales.shape != start.shape:
            raise FolderError(f"the scales of {self.path} are {list(scales.shape)}; this model's are {list(start.shape)}")
        self.change.copy_(torch.where(start == 0, 0.0, scales / start - 1))
        if not torch.equal(self.scales(), scales):
            raise FolderError(f"the scales of {self.path} do not belong to this model: some of its own are 0")


def attach(model: Model, targets: str) -> dict[str, BlockScales]:
    """Let the block scales of each target layer be trained; return these layers by path.

    Raises SettingsError for targets that match no layer.
    """
    layers = frozen_linears(model)
    added = {path: BlockScales(layers[path]) for path in choose_targets(list(layers), targets)}
    for path, layer in added.items():
        model.replace_linear(path, layer)
    return added


def scaled_layers(model: nn.Module) -> dict[str, BlockScales]:
    """Return the layers whose scales are trained by path, in the model's order."""
    return {module.path: module for module in model.modules() if isinstance(module, BlockScales)}


def load_trained(folder: Path) -> AdapterFile:
    """Read the adapter of a folder; of one that has scales alone, the trained head, which replaces the base's."""
    if (folder / CONFIG).is_file() or not (folder / FILE).is_file():
        return peft_format.load(folder)
    head = {name: torch.from_numpy(array) for name, array in read_delta(folder).tensors.items()}
    return AdapterFile({}, head)


def delta_of(model: Model, layers: Mapping[str, str], reference: str) -> Delta:
    """Return what was trained, as it is now. `layers` are the sha256 of the base's codes by path."""
    scales = {path: layer.scales().numpy() for path, layer in scaled_layers(model).items()}
    head = {name: tensor.detach().numpy() for name, tensor in head_parameters(model).items()}
    return Delta(scales, dict(layers), head, reference)


@torch.no_grad()
def apply(model: Model, delta: Delta) -> None:
    """Put a delta into a model on the grid: into the layers whose scales it trains, else into new ones.

    Raises FolderError for what the model has no place for.
    """
    linears, present, head = model.linears(), scaled_layers(model), head_parameters(model)
    unknown = [path for path in delta.scales if path not in linears] + [name for name in delta.tensors if name not in head]
    unknown += [name for name, array in delta.tensors.items() if name in head and array.shape != tuple(head[name].shape)]
    if unknown:
        raise FolderError("\n  ".join(["the scales are of another model; this one has no such", *sorted(unknown)[:10]]))
    for path, scales in delta.scales.items():
        layer = present.get(path)
        if layer is None:
            layer = attach(model, path)[path]
        layer.set_scales(torch.from_numpy(scales))
    for name, array in delta.tensors.items():
        head[name].copy_(torch.from_numpy(array))
