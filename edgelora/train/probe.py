"""The probe: parts of a step on the loaded model, measured, before the first step; they correct the plan.

The largest piece of the schedule is computed, forward and backward, with a quarter of its rows (or of its tokens) and with half
of them. Gradients are thrown away and the random state is put back: the run's weights are those of a run without a probe. The
formulas of costs.py and speed.py give how memory and time go on from there to the whole piece.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from edgelora import console, hardware, memory
from edgelora.models.predictor import to_tensors
from edgelora.planning import costs, speed
from edgelora.planning.costs import Correction, Piece
from edgelora.planning.planner import piece_of
from edgelora.tasks.base import Example

if TYPE_CHECKING:
    from edgelora.data.store import Store
    from edgelora.models.predictor import Collate
    from edgelora.planning.choose import Choice
    from edgelora.planning.plan import Plan
    from edgelora.planning.planner import Planner
    from edgelora.tasks.base import Task

MB = 1 << 20
SHARES = (0.25, 0.5)  # of the largest piece
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

    def measure(self, rows: Sequence[int], *, accumulate: bool) -> list[Measured]:
        """Compute the parts SHARES of a piece twice: first its memory is watched, then it is timed, for who watches disturbs.

        With `accumulate`, gradients of a part stay while the next is computed, as they do in a step of several pieces.
        """
        examples = [self.store[row] for row in rows]
        memory.trim()  # what loading has left in the heap would hide what the parts take
        random, training = torch.get_rng_state(), self.model.training
        self.model.train()
        found = []
        try:
            for watched in (True, False):
                for share in SHARES:
                    found.append(self._part(shortened(examples, share), watched=watched))
                    if not accumulate:
                        self._forget()
        finally:
            self._forget()
            self.model.train(training)
            torch.set_rng_state(random)
        half = len(SHARES)
        return [Measured(a.piece, b.seconds, a.peak) for a, b in zip(found[:half], found[half:], strict=True)]

    def _part(self, examples: list[Example], *, watched: bool) -> Measured:
        batch = to_tensors(self.collate(examples))
        counted = 0

        def work() -> None:
            nonlocal counted
            loss, counted = self.task.loss(self.model, batch)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here

        started, peak = time.perf_counter(), 0
        if watched:
            peak = peak_of(work)
        else:
            work()
        seconds = time.perf_counter() - started
        lengths = [len(example) for example in examples]
        padded = "starts" not in batch  # packed rows have no padding
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
    work, rows = planner.situation.work, choice.settings.micro_batch
    several = work.loads[rows].pieces > work.steps
    planner = planner.corrected(*correct(planner, choice, probe.measure(work.rows[rows], accumulate=several)))
    plan, better = planner.again(choice)
    if better.settings != choice.settings:
        console.say("the probe of the loaded model corrects the plan")
    return planner, plan, better


def correct(planner: Planner, choice: Choice, found: Sequence[Measured]) -> tuple[Correction, float]:
    """Return what the measurements say of memory, and the seconds of this machine for one of the reference machine.

    Memory of a part is F + a·A, A the formulas' bytes of its activations: a from the difference of the two parts, where that
    is more than noise, F from the larger part.
    """
    shape, settings = planner.situation.shape, choice.settings
    small, large = found[-2], found[-1]
    heap = costs.heap_factor(shape, settings)
    kept = [heap * costs.activation_bytes(shape, settings, part.piece) for part in (small, large)]
    slope = 1.0
    if kept[1] - kept[0] > CLEAR:
        slope = min(1.5, max(0.9, (large.peak - small.peak) / (kept[1] - kept[0])))
    # The formulas' parts without activations, as they are while the probe runs: the optimizer has no moments yet.
    resident = sum(size for name, size in choice.parts.items() if name not in ("activations", costs.GROWING))
    resident -= costs.moment_bytes(shape, settings) + planner.situation.correction.fixed
    # Never less than the formulas: a heap has no holes yet, and in a memory cgroup less may be resident than is needed.
    fixed = max(0, large.peak - round(slope * kept[1]) - resident)
    return Correction(fixed, slope), pace(planner, choice, small, large)


def pace(planner: Planner, choice: Choice, small: Measured, large: Measured) -> float:
    """Return measured seconds over the formulas', at the tokens that the run's pieces have on average."""
    shape, settings = planner.situation.shape, choice.settings
    ratios = [
        part.seconds / speed.piece_seconds(shape, settings, part.piece.tokens, part.piece.supervised) for part in (small, large)
    ]
    load = planner.situation.work.loads[settings.micro_batch]
    span = large.piece.tokens - small.piece.tokens
    place = (load.tokens / max(1, load.pieces) - small.piece.tokens) / span if span > 0 else 1.0
    place = min(1.0, max(0.0, place))
    return ratios[0] + (ratios[1] - ratios[0]) * place
