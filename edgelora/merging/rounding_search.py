"""`merge --size` and `--loss`: bits and block size of each layer, by what they do to the loss.

1. The merged model in fp32 gives, on the calibration rows, the mean squared gradient of the loss at each layer's outputs: what
   an error there costs (the diagonal of the empirical Fisher information, as in SqueezeLLM, arXiv 2306.07629).
2. Every layer is rounded by GPTQ in each of CANDIDATES, on what the layers before it give in the first of them; the results
   wait in a file. Mean squared output error × mean squared gradient predicts the rise of the loss.
3. `quant/mixed.py` climbs from the smallest model by gain per byte. What is chosen, and some points beside it for the table, is
   put together from the file and its loss measured; a limit of the loss is searched by bisection over measured losses.
"""

from __future__ import annotations

import bisect
import functools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgelora import console
from edgelora.adapters.merged_source import merged_weight
from edgelora.errors import MachineError, SettingsError
from edgelora.merging.calibration import Calibration
from edgelora.merging.levels import choose_levels
from edgelora.merging.rounding import put, round_model
from edgelora.merging.sensitivity import gradients
from edgelora.models.walk import walk_through
from edgelora.quant import mixed
from edgelora.quant.bits import Choice
from edgelora.quant.checkpoint import StreamedSafetensors
from edgelora.quant.grid import QuantizedTensor, quantize
from edgelora.quant.mixed import Assignment, Option

if TYPE_CHECKING:
    from edgelora.merging.merge import Inputs
    from edgelora.merging.rounding_plan import RoundingPlan, Wish

# The first is what the search for the others' inputs goes on with.
CANDIDATES = (Choice(4, 32), Choice(4, 64), Choice(4, 128), Choice(8, 64))
TABLES = (Choice(8, 32), Choice(4, 32))  # embedding and LM head
BISECTIONS = 8
MANIFEST_BYTES = 1 << 10  # of a layer, for its lines in the manifest and the header of the weights


@dataclass
class Candidates:
    """Every layer in every candidate, in a file; what is read of it is mapped."""

    path: Path
    shapes: Mapping[str, tuple[int, int]]
    choices: Callable[[str], Sequence[Choice]]
    errors: dict[tuple[str, Choice], Tensor] = field(default_factory=dict)  # mean squared error of each output, [N]

    @contextmanager
    def writing(self) -> Iterator[StreamedSafetensors]:
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for path, (outputs, inputs) in self.shapes.items():
            for choice in self.choices(path):
                blocks = (outputs, -(-inputs // choice.block_size))
                name = key(path, choice)
                tensors[f"{name}.codes"] = torch.uint8, (*blocks, choice.block_size * choice.bits // 8)
                tensors[f"{name}.scales"] = torch.float32, blocks
        with StreamedSafetensors(self.path, tensors) as file:
            yield file

    def read(self, path: str, choice: Choice) -> QuantizedTensor:
        from safetensors import safe_open

        opened: Any = safe_open
        with opened(self.path, framework="pt") as file:
            codes, scales = (file.get_tensor(f"{key(path, choice)}.{part}") for part in ("codes", "scales"))
        return QuantizedTensor(codes, scales, choice.bits, choice.block_size, self.shapes[path][1])


def key(path: str, choice: Choice) -> str:
    return f"{path}:{choice.bits}:{choice.block_size}"


def write(file: StreamedSafetensors, path: str, tensor: QuantizedTensor) -> None:
    name = key(path, Choice(tensor.bits, tensor.block_size))
    file.write(f"{name}.codes", tensor.codes)
    file.write(f"{name}.scales", tensor.scales)


def search(inputs: Inputs, rows: Calibration, wish: Wish, shapes: Mapping[str, tuple[int, int]], staging: Path) -> RoundingPlan:
    """Choose bits and block sizes under the limit of `wish`. Raises SettingsError if it cannot be kept."""
    from edgelora.merging.rounding_plan import RoundingPlan, load_merged

    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=f"{staging.name}.") as folder:
        model, scores, fits = load_merged(inputs, rows, scored=True)
        if not fits:
            raise MachineError(
                "--size and --loss need the merged model in fp32 in memory, which is too large for this machine",
                hint="leave them out: without them the model is rounded block by block",
            )
        least = scores[0]["loss"] if scores else rows.loss(model)
        costs = gradients(model, rows)
        tables = set(inputs.adapted.layout.embeddings)
        candidates = Candidates(Path(folder) / "candidates", shapes, lambda path: TABLES if path in tables else CANDIDATES)
        groups = round_candidates(model, inputs, rows, candidates)
        options = {name: predict(paths, candidates, costs) for name, paths in groups.items()}
        measure = Measure(model, rows, candidates, groups)
        options |= measure.tables(tables)
        fixed = fixed_bytes(inputs, shapes)
        rungs = mixed.ladder(options)
        number = measure.choose(rungs, wish, fixed, least)
        trade = measure.trade(rungs, number, fixed, least)
        chosen = {path: rungs[number][name].choice for name, paths in groups.items() for path in paths}
        plan = RoundingPlan(chosen, "gptq", rows=rows)
        # The file goes away with its folder: these are copies.
        for path, choice in chosen.items():
            found = candidates.read(path, choice)
            plan.tensors[path] = QuantizedTensor(found.codes.clone(), found.scales.clone(), *grid(found))
        scores.append({"what": "merged, rounded", **measure.score(rungs, number)})
        measure.put_together(rungs[number])
        plan.accuracy_levels, losses = choose_levels(model, rows)
    target = {"size": wish.size} if wish.size is not None else {"loss": wish.loss}
    plan.facts, plan.trade = {"method": "gptq", **target, **rows.facts, "results": scores, "activations": losses}, trade
    return plan


def grid(tensor: QuantizedTensor) -> tuple[int, int, int]:
    return tensor.bits, tensor.block_size, tensor.num_inputs


def fixed_bytes(inputs: Inputs, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Return the bytes of the merged folder that no choice changes: plain tensors, the tokenizer's files, the manifest."""
    from edgelora.tokenizer import TOKENIZER_FILES

    adapted = inputs.adapted
    plain = [name for name in adapted.layout.names() if name.removesuffix(".weight") not in shapes or name.endswith(".bias")]
    files = [path for name in TOKENIZER_FILES if (path := inputs.folder / name).is_file()]
    weights = 4 * sum(math.prod(adapted.shape(name)) for name in plain)
    notes = MANIFEST_BYTES * (len(shapes) + len(plain) // 4 + 16 + len(inputs.labels) // 4)
    return weights + sum(path.stat().st_size for path in files) + notes


def round_candidates(model: Any, inputs: Inputs, rows: Calibration, candidates: Candidates) -> dict[str, list[str]]:
    """Round every layer in every candidate; return the paths of each group that is stored alike, by its first path."""
    weight = functools.partial(merged_weight, inputs.adapted)
    layout = inputs.adapted.layout
    groups: dict[str, list[str]] = {path: [path] for path in layout.embeddings}
    with candidates.writing() as file, torch.no_grad():
        for path in layout.embeddings:
            for choice in TABLES[::-1]:
                tensor = quantize(weight(path), choice.bits, choice.block_size)
                write(file, path, tensor)
            put(model, path, tensor)
        walk = walk_through(model, rows.batches())
        with console.progress(f"rounding on {len(rows.examples)} rows", total=len(layout.linears)) as bar:
            for results in round_model(model, walk, weight, candidates.choices):
                path = results[0].path
                groups.setdefault(results[0].group, []).append(path)
                for result in results:
                    write(file, path, result.tensor)
                    choice = Choice(result.tensor.bits, result.tensor.block_size)
                    candidates.errors[path, choice] = result.error_N
                bar.update(1)
    return groups


def predict(paths: Sequence[str], candidates: Candidates, costs: Mapping[str, Tensor]) -> list[Option]:
    """Return the options of layers that are stored alike."""
    options = []
    for choice in candidates.choices(paths[0]):
        size = sum(choice.num_bytes(*candidates.shapes[path]) for path in paths)
        errors = [(candidates.errors.get((path, choice)), costs.get(path)) for path in paths]
        rises = [float((error * cost).sum()) for error, cost in errors if error is not None and cost is not None]
        options.append(Option(choice, size, sum(rises)))
    return options


@dataclass
class Measure:
    """Losses of assignments, each put together and scored once: on held-out rows, or where there are none on the others."""

    model: Any
    rows: Calibration
    candidates: Candidates
    groups: Mapping[str, Sequence[str]]
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    _now: dict[str, Choice] = field(default_factory=dict)

    def tables(self, paths: set[str]) -> dict[str, list[Option]]:
        """Return the options of embedding and LM head: what 4 bits there do to the loss of the calibration rows is measured."""
        base = self.rows.loss(self.model)
        found = {}
        for path in paths:
            options = []
            for choice in TABLES:
                put(self.model, path, self.candidates.read(path, choice))
                rise = max(0.0, self.rows.loss(self.model) - base) if choice != TABLES[0] else 0.0
                options.append(Option(choice, choice.num_bytes(*self.candidates.shapes[path]), rise))
            put(self.model, path, self.candidates.read(path, TABLES[0]))
            found[path] = options
        return found

    def score(self, rungs: Sequence[Assignment], number: int) -> dict[str, float]:
        if number not in self.scores:
            self.put_together(rungs[number])
            self.scores[number] = self.rows.score(self.model) or {"loss": self.rows.loss(self.model)}
        return self.scores[number]

    def put_together(self, assignment: Assignment) -> None:
        """Let the model compute with the layers as the assignment stores them."""
        for name, paths in self.groups.items():
            choice = assignment[name].choice
            for path in paths:
                if self._now.get(path) != choice:
                    put(self.model, path, self.candidates.read(path, choice))
                    self._now[path] = choice

    def choose(self, rungs: Sequence[Assignment], wish: Wish, fixed: int, least: float) -> int:
        """Return the number of the rung that keeps the limit: the best of a size, or the smallest of a loss.

        least: the loss in fp32.
        """
        if wish.size is not None:
            number = mixed.largest_within(rungs, wish.size - fixed)
            if number is None:
                smallest = console.show_bytes(mixed.num_bytes(rungs[0]) + fixed)
                raise SettingsError(
                    f"--size {console.show_bytes(wish.size)} cannot be had: this model takes at least {smallest}"
                )
            return number
        assert wish.loss is not None
        best = self.score(rungs, len(rungs) - 1)["loss"]
        limit = least * (1 + wish.loss)
        if best > limit:
            raise SettingsError(
                f"--loss {wish.loss:g} cannot be had: 8 bits everywhere have a loss of {best:.4g}, {limit:.4g} is allowed"
            )
        low, high = 0, len(rungs) - 1
        for _ in range(BISECTIONS):
            if low >= high:
                break
            middle = (low + high) // 2
            low, high = (low, middle) if self.score(rungs, middle)["loss"] <= limit else (middle + 1, high)
        self.score(rungs, high)
        return high

    def trade(self, rungs: Sequence[Assignment], chosen: int, fixed: int, least: float) -> list[dict[str, Any]]:
        """Return the table's rows: the smallest, the chosen, the largest and two between; `least`: the loss in fp32."""
        sizes = [mixed.num_bytes(rung) for rung in rungs]
        middles = [bisect.bisect_left(sizes, (sizes[chosen] + sizes[end]) / 2) for end in (0, -1)]
        weights = sum(math.prod(self.candidates.shapes[path]) for paths in self.groups.values() for path in paths)
        table = []
        for number in sorted({0, chosen, len(rungs) - 1, *middles}):
            loss = self.score(rungs, number)["loss"]
            picked = [rungs[number][name].choice for name, paths in self.groups.items() for _ in paths]
            table.append(
                {
                    "size_mb": round((sizes[number] + fixed) / 2**20, 2),
                    "bits a weight": round(8 * sizes[number] / weights, 2),
                    "loss": round(loss, 4),
                    "rise": f"{100 * (loss / least - 1):+.1f}%" if math.isfinite(least) else None,
                    "8 bits": sum(choice.bits == 8 for choice in picked),
                    "blocks": " ".join(f"{size}×{n}" for size, n in sorted(Counter(c.block_size for c in picked).items())),
                    "chosen": "←" if number == chosen else "",
                }
            )
        return table
