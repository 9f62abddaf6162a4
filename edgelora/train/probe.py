"""The probe: parts of a step on the loaded model, measured, before the first step; they correct the plan.

First the largest piece of the schedule is computed, forward and backward, with a quarter of its rows (or of its tokens) and
with half of them: the formulas of costs.py say how memory goes on from there. Where the plan that follows fits, it is
rehearsed: half of its largest piece and the whole of it are measured as they will be in training. Gradients are thrown away
and the random state is put back: the run's weights are those of a run without a probe.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from edgelora import console, hardware, memory
from edgelora.adapters import inject
from edgelora.models import slab
from edgelora.models.predictor import to_tensors
from edgelora.planning import costs, speed
from edgelora.planning.costs import Correction, Piece
from edgelora.planning.planner import piece_of
from edgelora.quant.grid import quantize
from edgelora.tasks.base import Example
from edgelora.train import on_grid, start

if TYPE_CHECKING:
    from edgelora.data.store import Store
    from edgelora.models.predictor import Collate
    from edgelora.planning.choose import Choice
    from edgelora.planning.plan import Plan
    from edgelora.planning.planner import Planner
    from edgelora.tasks.base import Task

MB = 1 << 20
FIRST_SHARES, WHOLE = (0.25, 0.5), (0.5, 1.0)  # of the largest piece
REHEARSALS = 2
ROUNDED = 24 << 20  # weights that are rounded for their time: with what they are rounded from, more than caches hold
LONG = 10.0  # seconds from which a pass is not made again for its time: what disturbs it is small beside it
REPEATS, REPEATED = 3, 4.0  # passes for the time of a part, of which the median counts; seconds after which one is the last
CROWDED = 1.5  # times what is resident: a memory limit below makes the system drop pages that are in use
CLEAR = 24 * MB  # a difference in memory that is more than noise
PATIENCE = 0.001  # seconds between two looks at the memory


@dataclass(frozen=True)
class Measured:
    """What one part of a piece took. `peak` is the largest resident memory, in bytes."""

    piece: Piece
    seconds: float
    peak: int


@dataclass
class Probe:
    """The loaded model with its adapters, and the rows that it would be trained on."""

    model: Any
    task: Task
    collate: Collate
    store: Store
    settle: Callable[[Plan], None] = lambda plan: None  # lets the model keep for backward what a plan says

    def measure(self, rows: Sequence[int], shares: Sequence[float], *, accumulate: bool, timed: bool) -> list[Measured]:
        """Compute parts of a piece while their memory is watched, and then, with `timed`, for their time: who watches disturbs.

        With `accumulate`, gradients of a part stay while the next is computed, as they do in a step of several pieces.
        """
        examples = [self.store[row] for row in rows]
        random, training = torch.get_rng_state(), self.model.training
        self.model.train()
        parts = [shortened(examples, share) for share in shares]
        try:
            found = [self._part(part, watched=True, keep=accumulate) for part in parts]
            for index, part in enumerate(parts):
                if timed and found[index].seconds < LONG:
                    found[index] = dataclasses.replace(found[index], seconds=self._time(part, keep=accumulate))
        finally:
            self._forget()
            self.model.train(training)
            torch.set_rng_state(random)
        return found

    def _time(self, examples: list[Example], *, keep: bool) -> float:
        """Return the median seconds of a few passes."""
        taken: list[float] = []
        while len(taken) < REPEATS and sum(taken) < REPEATED:
            examples = self.as_new(examples)
            taken.append(self._part(examples, watched=False, keep=keep).seconds)
        return statistics.median(taken)

    def as_new(self, examples: list[Example]) -> list[Example]:
        """Return rows of another length, where lengths vary: in training too, products are compiled for nearly every step."""
        lengths = self.store.lengths
        if int(lengths.min()) == int(lengths.max()) or len(examples[-1]) < 4 or "ids" not in examples[-1].arrays:
            return examples
        return [*examples[:-1], _tail(examples[-1], len(examples[-1]) - 1)]

    def rounding(self, *, started: bool) -> float:
        """Return the seconds of rounding all adapted layers, as every step does where training is on the grid: some of them are
        rounded, for all at once would bring a streamed model into memory. `started`: from a start of their own, made later."""
        found = [adapter for adapter in inject.adapters(self.model).values() if adapter.grid is not None]
        sizes = itertools.accumulate(adapter.out_features * adapter.in_features for adapter in found)
        some = found[: max(1, sum(size <= ROUNDED for size in sizes))]
        for adapter in some if started else ():
            adapter.begin_with(quantize(adapter.frozen.weight_fp32(), start.START_BITS, on_grid.BLOCK_SIZE))
        for _ in range(2):  # the first is not counted
            begun = time.perf_counter()
            for adapter in some:
                with torch.no_grad():
                    adapter.lora_B.mul_(1.0)  # the same bits, counted as a change
                adapter.rounded()
        seconds = time.perf_counter() - begun
        for adapter in some if started else ():
            adapter.begin_with(None)
        weights = [sum(adapter.out_features * adapter.in_features for adapter in part) for part in (found, some)]
        return seconds * weights[0] / max(1, weights[1])

    def _part(self, examples: list[Example], *, watched: bool, keep: bool) -> Measured:
        batch = to_tensors(self.collate(examples))
        counted = 0

        def work() -> None:
            nonlocal counted
            loss, counted = self.task.loss(self.model, batch)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here

        if watched:  # what others have left in the heap would hide what this part takes
            slab.release()
            memory.trim()
        started, peak = time.perf_counter(), 0
        if watched:
            peak = peak_of(work)
        else:
            work()
        seconds = time.perf_counter() - started
        if not keep:
            self._forget()
        lengths = [len(example) for example in examples]
        padded = "ids" not in batch  # packed rows have no padding
        piece = piece_of(lengths, 1.0, padded=padded)
        return Measured(dataclasses.replace(piece, supervised=counted), seconds, peak)

    def _forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def shortened(examples: Sequence[Example], share: float) -> list[Example]:
    """Return a share of the rows, or where there are too few the last part of each: its targets are mostly there."""
    if len(examples) * share >= 1 or "ids" not in examples[0].arrays:  # a picture has no last part
        return list(examples[: max(1, math.floor(len(examples) * share))])
    return [_tail(example, max(2, math.ceil(len(example) * len(examples) * share))) for example in examples[:1]]


def _tail(example: Example, length: int) -> Example:
    """Return the last tokens of an example; what has no value per token stays."""
    whole = len(example)
    cut = {name: a[-length:] if a.ndim and a.shape[0] == whole else a for name, a in example.arrays.items()}
    return Example(cut)


def peak_of(work: Callable[[], None]) -> int:
    """Return the largest resident memory, in bytes, while `work` runs: of a thread that looks every millisecond, or the
    system's own record where that was broken."""
    before, highest, done = hardware.peak_rss_mb(), hardware.rss_mb(), threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(PATIENCE):
            highest = max(highest, hardware.rss_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    record = hardware.peak_rss_mb()
    return round(max(highest, record if record > before else 0.0) * MB)


def refine(planner: Planner, choice: Choice, probe: Probe) -> tuple[Planner, Plan, Choice]:
    """Return the planner that knows what the probe found, and its plan: where the budget asks for it, with less at once.

    Raises MachineError when nothing fits.
    """
    loaded = choice.settings.loaded
    found = probe.measure(rows_of(planner, choice), FIRST_SHARES, accumulate=accumulates(planner, choice), timed=False)
    planner = planner.corrected(correct(planner, choice, found), planner.rate)
    plan, better = planner.again(choice)
    reached = max(part.peak for part in found)
    for _ in range(REHEARSALS):
        if better.settings.loaded != loaded:
            break  # the model is loaded again, and probed again
        probe.settle(plan)
        found = probe.measure(rows_of(planner, better), WHOLE, accumulate=accumulates(planner, better), timed=True)
        grid = better.settings
        rounding = probe.rounding(started=grid.grid_start) if grid.grid_bits else 0.0
        rate = pace(planner, better, found, rounding)
        planner = planner.corrected(correct(planner, better, found, whole=True), rate)
        reached = max(reached, *(part.peak for part in found))
        rehearsed = better.settings
        plan, better = planner.again(better)
        if better.settings == rehearsed:
            break
    if better.settings != choice.settings:
        console.say("the probe of the loaded model corrects the plan")
    return planner, plan.reached(reached / MB), better


def rows_of(planner: Planner, choice: Choice) -> Sequence[int]:
    """Return the rows of the largest piece."""
    return planner.situation.work.rows[choice.settings.micro_batch]


def accumulates(planner: Planner, choice: Choice) -> bool:
    """Tell whether a step has several pieces."""
    work = planner.situation.work
    return work.loads[choice.settings.micro_batch].pieces > work.steps


def correct(planner: Planner, choice: Choice, found: Sequence[Measured], *, whole: bool = False) -> Correction:
    """Return what the measurements say of memory.

    Memory of a part is F + a·A, A the formulas' bytes of its activations: a from the difference of the two parts, where that
    is more than noise, F from the larger part. `whole`: that is the whole piece, so F + a·A is what was measured.
    """
    shape, settings = planner.situation.shape, choice.settings
    small, large = found
    heap = costs.heap_factor(shape, settings)
    kept = [heap * costs.activation_bytes(shape, settings, part.piece) for part in (small, large)]
    slope = 1.0
    if kept[1] - kept[0] > CLEAR:
        slope = min(1.5, max(0.6 if whole else 0.9, (large.peak - small.peak) / (kept[1] - kept[0])))
    # The formulas' parts without activations, as they are while the probe runs.
    resident = sum(size for name, size in choice.parts.items() if name not in ("activations", costs.GROWING))
    resident -= costs.later_bytes(shape, settings) + planner.situation.correction.fixed
    fixed = large.peak - round(slope * kept[1]) - resident
    # A part of a piece says too little for less than the formulas; in a tight memory cgroup less is resident than is needed.
    crowded = hardware.memory_limit() < CROWDED * large.peak
    return Correction(fixed if whole and not crowded else max(0, fixed), slope)


def pace(planner: Planner, choice: Choice, found: Sequence[Measured], rounding: float) -> float:
    """Return measured seconds of the run over the formulas': of its pieces, at the tokens that they have on average, and of
    `rounding` in every step."""
    shape, settings = planner.situation.shape, choice.settings
    small, large = found
    ratios = [part.seconds / speed.piece_seconds(shape, settings, part.piece.tokens, part.piece.supervised) for part in found]
    load = planner.situation.work.loads[settings.micro_batch]
    span = large.piece.tokens - small.piece.tokens
    place = (load.tokens / max(1, load.pieces) - small.piece.tokens) / span if span > 0 else 1.0
    ratio = ratios[0] + (ratios[1] - ratios[0]) * min(1.0, max(0.0, place))
    steps = load.steps * speed.step_seconds(shape, settings)
    updates = load.steps * (rounding + speed.update_seconds(shape, settings))
    return (ratio * (choice.seconds - steps) + updates) / choice.seconds
