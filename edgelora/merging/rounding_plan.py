"""How each layer of a merged model is stored, and its codes where the user's rows decide them: what `merge` writes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgelora import console, hardware
from edgelora.adapters.merged_source import merged_source, merged_weight
from edgelora.errors import SettingsError
from edgelora.merging import calibration
from edgelora.merging.calibration import Calibration
from edgelora.merging.levels import choose_levels
from edgelora.merging.rounding import METHODS, put, round_model
from edgelora.models.load import load_model
from edgelora.models.walk import walk_through
from edgelora.quant.bits import PRECISION_BITS, Choice, choose_bits, error_bits
from edgelora.quant.clip import round_clipped
from edgelora.quant.grid import QuantizedTensor, quantize
from edgelora.quant.measure import relative_error
from edgelora.train.on_grid import RoundedLayers

if TYPE_CHECKING:
    from edgelora.adapters.adapted import Adapted
    from edgelora.merging.merge import Inputs

FP32_SHARE = 0.5  # of the free memory, that the merged model in fp32 may take to be scored; a larger one is not


@dataclass(frozen=True)
class Wish:
    """What the user asks of the rounding. None: chosen here."""

    precision: str = "int4"
    block_size: int = 32
    calibrate: str | None = None  # rows to round with, where a run's own are not to be taken
    columns: Mapping[str, str] = field(default_factory=dict)
    rounding: str | None = None  # METHODS
    size: int | None = None  # bytes that the merged folder may take
    loss: float | None = None  # relative rise of the loss that is allowed


@dataclass
class RoundingPlan:
    """choices: of each layer on the grid. tensors: those that rows have rounded; the others are rounded when written.

    facts: method, rows and the loss on held-out rows, for the manifest. trade: rows of a table (size, loss).
    """

    choices: dict[str, Choice]
    method: str = "nearest"
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    accuracy_levels: dict[str, int] = field(default_factory=dict)
    trade: list[dict[str, Any]] = field(default_factory=list)
    trained: RoundedLayers | None = None  # those that on-grid training computed with
    rows: Calibration | None = None  # that the layers were rounded with; the result is measured on those held out (shipped.py)

    def tensor(self, path: str, weight_NK: torch.Tensor) -> QuantizedTensor:
        """Return the layer at `path` as it ships."""
        if path in self.tensors:
            return self.tensors[path]
        if self.trained is not None and path in self.trained:
            return self.trained.tensor(path, weight_NK.shape[1])
        choice = self.choices[path]
        # A table is read by rows, and the LM head in 8 bits: nothing to gain by clipping.
        clipped = self.method in ("clip", "gptq") and choice.bits < 8
        return (round_clipped if clipped else quantize)(weight_NK, choice.bits, choice.block_size)


def plan_rounding(inputs: Inputs, wish: Wish, staging: Path) -> RoundingPlan:
    """Decide how each layer is stored; round with rows where there are rows. Raises UserError for what cannot be had."""
    if inputs.facts.get("settings", {}).get("method") == "scales":
        from edgelora.planning.scales import plan_scales

        return plan_scales(inputs, wish)
    adapted, trained = inputs.adapted, inputs.grid
    searched = wish.size is not None or wish.loss is not None
    if wish.precision == "fp32":
        refuse_for_fp32(wish)
        return RoundingPlan({})
    shapes = layer_shapes(adapted)
    on_grid = (trained.get("precision"), trained.get("block_size")) == (wish.precision, wish.block_size)
    if on_grid and not searched and wish.rounding is None and wish.calibrate is None:
        choices = {path: Choice(int(trained["bits"].get(path, 8)), wish.block_size) for path in shapes}
        return RoundingPlan(choices, facts={"method": "trained"}, trained=RoundedLayers.open(inputs.folder, trained))
    fine = PRECISION_BITS[wish.precision] == 8 and not searched and wish.rounding is None and wish.calibrate is None
    rows = None if fine else find_rows(inputs, wish)  # rounding to 8 bits loses next to nothing: no minutes are spent on it
    if searched:
        if rows is None:
            raise SettingsError(
                "--size and --loss choose bits by what they do to the loss, which takes rows", hint="add --calibrate ROWS"
            )
        from edgelora.merging.rounding_search import search

        return search(inputs, rows, wish, shapes, staging)
    choices = default_choices(adapted, wish, shapes)
    method = wish.rounding or ("gptq" if rows is not None else "nearest")
    if rows is None:
        if method == "gptq":
            raise SettingsError("GPTQ makes up for errors on rows, and there are none", hint="add --calibrate ROWS")
        if error_bits(wish.precision) is not None:
            console.say("rounded without rows; --calibrate ROWS (some of the model's own task) would lose less")
        return RoundingPlan(choices, method, facts={"method": method})
    return rounded_with_rows(inputs, rows, choices, method)


def refuse_for_fp32(wish: Wish) -> None:
    given = {"--size": wish.size, "--loss": wish.loss, "--calibrate": wish.calibrate, "--rounding": wish.rounding}
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise SettingsError(f"{' and '.join(named)}: fp32 rounds nothing", hint="leave it out, or choose --precision int4")


def layer_shapes(adapted: Adapted) -> dict[str, tuple[int, int]]:
    paths = (*adapted.layout.embeddings, *adapted.layout.linears)
    return {path: (shape[0], shape[1]) for path in paths if (shape := adapted.shape(f"{path}.weight"))}


def default_choices(adapted: Adapted, wish: Wish, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Choice]:
    """Return bits by the rule of `quant/bits.py`, and the block size asked for."""
    errors = {}
    if (few := error_bits(wish.precision)) is not None:
        for path in adapted.layout.linears:
            errors[path] = relative_error(merged_weight(adapted, path), few, wish.block_size)
    bits = choose_bits(wish.precision, shapes, errors, set(adapted.layout.embeddings))
    return {path: Choice(number, wish.block_size) for path, number in bits.items()}


def find_rows(inputs: Inputs, wish: Wish) -> Calibration | None:
    """Return the rows of --calibrate, else a run's own; None where there are none, or none are wanted."""
    from edgelora.train.run import length_limit

    if wish.calibrate is not None:
        longest = min(calibration.MAX_LENGTH, length_limit(inputs.adapted.source.config))
        return calibration.from_data(wish.calibrate, wish.columns, inputs.task, inputs.labels, inputs.folder, longest)
    return calibration.from_run(inputs.folder, inputs.task, inputs.labels, inputs.facts.get("settings", {}))


@torch.no_grad()
def rounded_with_rows(inputs: Inputs, rows: Calibration, choices: dict[str, Choice], method: str) -> RoundingPlan:
    """Round every layer with rows, each seeing what the rounded ones before it make of them, and score the result."""
    assert method in METHODS
    adapted = inputs.adapted
    layout = adapted.layout
    model, _, _ = load_merged(inputs, rows, scored=False)
    weight = functools.partial(merged_weight, adapted)
    plan = RoundingPlan(choices, method, rows=rows)
    for path in layout.embeddings:
        plan.tensors[path] = plan.tensor(path, weight(path))
        put(model, path, plan.tensors[path])
    walk = walk_through(model, rows.batches())
    narrow = 0
    with console.progress(f"rounding on {len(rows.examples)} rows", total=len(layout.linears)) as bar:
        for results in round_model(model, walk, weight, lambda path: [choices[path]], method):
            plan.tensors[results[0].path] = results[0].tensor
            narrow += not results[0].whole
            bar.update(1)
    if method == "gptq" and narrow:
        console.say(f"{narrow} layers have too many inputs for GPTQ: clipped, weighted by the size of their inputs")
    plan.accuracy_levels, losses = choose_levels(model, rows)
    plan.facts = {"method": method, **rows.facts, "activations": losses}
    return plan


def load_merged(inputs: Inputs, rows: Calibration, *, scored: bool) -> tuple[Any, list[dict[str, Any]], bool]:
    """Return the merged model, its score in fp32 on held-out rows, and whether its weights are there.

    One that is too large for the memory comes without weights in its linear layers, and without a score.
    """
    weights = 4 * sum(outputs * width for outputs, width in layer_shapes(inputs.adapted).values())
    fits = weights < FP32_SHARE * hardware.available_memory()
    source = merged_source(inputs.adapted, inputs.labels, linears=fits)
    with console.progress("loading the merged model"):
        model = load_model(source, inputs.task, base_bits=32, labels=inputs.labels).eval()
    if not fits or not (rows.held_out and scored):
        return model, [], fits
    with console.progress(f"scoring it in fp32 on {len(rows.held_out)} held-out rows"):
        return model, [{"what": "merged, fp32", **rows.score(model)}], fits
