"""A scales-only run as it ships: the base's codes, bit for bit those of training, with the trained scales."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from edgelora.errors import FolderError, SettingsError
from edgelora.merging.rounding_plan import RoundingPlan, layer_shapes
from edgelora.quant.bits import Choice
from edgelora.quant.grid import QuantizedTensor
from edgelora.scales_delta import Delta, codes_digest, read_delta

if TYPE_CHECKING:
    from edgelora.merging.merge import Inputs
    from edgelora.merging.rounding_plan import Wish


@dataclass
class ScalesPlan(RoundingPlan):
    """Rounds nothing but the base, as it was rounded before training, and takes the scales from the delta."""

    delta: Delta = field(default_factory=lambda: Delta({}, {}))
    given: dict[str, QuantizedTensor] = field(default_factory=dict)  # what a merged base has on the grid already

    def tensor(self, path: str, weight_NK: torch.Tensor) -> QuantizedTensor:
        """Return the layer at `path` as it ships. Raises FolderError if its codes are not those of training."""
        found = self.given[path] if path in self.given else super().tensor(path, weight_NK)
        trained = self.delta.scales.get(path)
        wanted = self.delta.layers.get(path)
        if wanted is not None and codes_digest(found.codes.numpy(), found.bits, found.block_size) != wanted:
            raise FolderError(f"the codes of {path} are not those that its scales were trained with: the base has changed")
        return found if trained is None else dataclasses.replace(found, scales=torch.from_numpy(trained))


def plan_scales(inputs: Inputs, wish: Wish) -> ScalesPlan:
    """Return the plan of a scales-only run. Raises SettingsError for what would change its integers."""
    asked = {"--size": wish.size, "--loss": wish.loss, "--calibrate": wish.calibrate, "--rounding": wish.rounding}
    problems = [f"{name} would choose other integers" for name, value in asked.items() if value is not None]
    if wish.precision != inputs.grid["precision"]:
        problems.append(f"its precision is {inputs.grid['precision']}, not {wish.precision}")
    if problems:
        hint = "leave it out; edgelora merge MODEL --calibrate ROWS, and training on the result, starts from better integers"
        raise SettingsError("\n  ".join(["a scales-only run ships the integers it was trained with:", *problems]), hint=hint)
    source, bits = inputs.adapted.source, inputs.grid["bits"]
    choices = {path: Choice(int(bits.get(path, 8)), inputs.grid["block_size"]) for path in layer_shapes(inputs.adapted)}
    given = {}
    if source.merged is not None:
        for path, layer in source.merged.layers.items():
            tensor = source.merged.read_linear(path)  # mapped: no copy
            assert isinstance(tensor, QuantizedTensor)
            given[path], choices[path] = tensor, Choice(layer["bits"], layer["block_size"])
    return ScalesPlan(choices, facts={"method": "scales"}, delta=read_delta(inputs.folder), given=given)
