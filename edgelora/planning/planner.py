"""From rows and a model's shape to a Plan: the schedule's pieces, the choice (choose.py), and its cost on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora import hardware, memory
from edgelora.errors import MachineError
from edgelora.planning import choose, closing, costs, speed
from edgelora.planning.choose import MARGIN, Choice, Situation, Work, micro_batches
from edgelora.planning.closing import Closing
from edgelora.planning.costs import Correction, Piece
from edgelora.planning.plan import DEFAULT_LENGTH, Plan
from edgelora.planning.shape import ModelShape
from edgelora.planning.speed import Load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgelora.config import FinetuneConfig
    from edgelora.data.prepare import Prepared
    from edgelora.models.source import ModelSource

MB = 1 << 20
MODELLING = "transformers.modeling_utils"
SUPERVISED = 0.6  # share of tokens that is trained on, where the rows have not told


@dataclass(frozen=True)
class Planner:
    """What a plan is made from, so that it can be made again when a probe has measured."""

    situation: Situation
    budget: int
    asked: bool  # the budget is the user's
    valid: Closing
    threads: int
    matmul: str
    limit: int
    rate: float  # seconds of this machine for one of the reference machine

    def plan(self) -> tuple[Plan, Choice]:
        """Return the plan. Raises MachineError with the least that would do when nothing fits."""
        chosen, wanted, least = choose.choose(self.situation, self.budget)
        if chosen is None:
            raise too_little(least, self.budget, self.situation.config)
        return self.complete(chosen, wanted), chosen

    def corrected(self, correction: Correction, rate: float) -> Planner:
        """Return the planner that knows what a probe has found."""
        situation = dataclasses.replace(self.situation, correction=correction)
        return dataclasses.replace(self, situation=situation, rate=rate)

    def again(self, before: Choice) -> tuple[Plan, Choice]:
        """Return the plan with the frozen weights as they are loaded already, where that gives up no more than before; else
        another one."""
        plan, chosen = self.plan()
        old = before.settings
        if chosen.settings.loaded == old.loaded:
            return plan, chosen
        config = dataclasses.replace(self.situation.config, base_bits=old.base_bits)
        loaded, _, _ = choose.choose(dataclasses.replace(self.situation, config=config), self.budget)
        if loaded is None or choose.given_up(loaded.settings) > choose.given_up(old):
            return plan, chosen
        return self.complete(loaded, choose.choose(self.situation, self.budget)[1]), loaded

    def complete(self, chosen: Choice, wanted: Choice) -> Plan:
        from edgelora.train import on_grid

        situation, settings, work = self.situation, chosen.settings, self.situation.work
        seconds = self.rate * chosen.seconds
        tokens, cache = scoring_limits(situation.shape, chosen.parts["activations"])
        first, later, writing = (self.rate * part for part in self.valid.seconds(situation.shape, settings, cache))
        plan = Plan(
            base_bits=settings.base_bits,
            micro_batch=settings.micro_batch,
            kept_blocks=settings.kept_blocks,
            keep_bits=settings.keep_bits,
            keep_in_file=settings.keep_in_file,
            stream=settings.stream,
            optimizer_bits=settings.optimizer_bits,
            grid_start=on_grid.STARTS[settings.grid_start],
            grid_scales=on_grid.SCALES[settings.grid_scales],
            threads=self.threads,
            matmul=self.matmul,
            max_length=self.limit,
            predicted_peak_mb=round(chosen.peak / MB, 1),
            scoring_tokens=tokens,
            cache_mb=round(cache / MB, 1),
            seconds=round(seconds, 1),
            total_seconds=0.0,
            budget_mb=round(self.budget / MB, 1),
            steps=work.steps,
            tokens=work.tokens,
            parts={name: round(size / MB, 1) for name, size in chosen.parts.items() if size},
            notes=self.notes(chosen, wanted),
            writing_seconds=round(writing, 1),
        )
        # Scored are the base, the adapter as often as is asked for, and both once more for the table, there unrounded too.
        scoring = (2 + (situation.config.precision != "fp32")) * first + (1 + max(1, situation.config.evaluations)) * later
        reason = plan.too_long_to_write
        total = seconds + scoring + (0.0 if reason else 2 * writing)
        return dataclasses.replace(plan, total_seconds=round(total, 1), notes=plan.notes + ([reason] if reason else []))

    def notes(self, chosen: Choice, wanted: Choice) -> list[str]:
        """Return what was given up for the budget, for people."""
        notes = choose.explain(wanted.settings, chosen.settings, self.situation.shape)
        if notes:
            notes.insert(0, f"the fastest settings would take {wanted.peak // MB} MB; {self.budget // MB} MB are allowed")
        if chosen.settings.stream:
            resident = self.situation.judge(dataclasses.replace(chosen.settings, stream=False))
            slower = chosen.seconds / resident.seconds
            notes.append(f"the frozen weights are read from the disk as they are used: {slower:.1f} times the time")
        if self.situation.half and self.situation.config.compute is None:
            notes.append('matrix products take bf16 operands, which is faster here; compute = "fp32" in a config file: exact')
        if not self.asked:
            notes.append("the budget is half of what is free; --ram sets it")
        return notes


def make_planner(source: ModelSource, prepared: Prepared, config: FinetuneConfig) -> Planner:
    """Return the planner of a run on prepared rows. Raises SettingsError for target modules that match nothing."""
    share = prepared.supervised["train"] / prepared.tokens["train"]
    valid = closing.measured(prepared, config) if prepared.rows.get("valid") else None
    lengths = prepared.store("train").lengths
    return planner_for(source, lengths, config, task=prepared.task, supervised=share, valid=valid)


def planner_for(
    source: ModelSource,
    lengths: NDArray[np.int64],
    config: FinetuneConfig,
    *,
    task: str | None = None,
    supervised: float = SUPERVISED,
    valid: Closing | None = None,
) -> Planner:
    """Return the planner for training rows of `lengths` tokens, of which the share `supervised` is trained on.

    `valid`: the rows of the closing table; without them, rows as those of training.
    """
    from edgelora.models import gemm
    from edgelora.tasks import get_task
    from edgelora.train.run import length_limit

    task = task or config.task or guess_task(source)
    shape = ModelShape.of(source, task)
    threads = config.threads or hardware.physical_cores()
    matmul = gemm.choose(threads, config.compute)
    half = matmul == gemm.BF16
    rate = matrix_rate(threads, gemm.ONEDNN if half else matmul)
    memory.forget_code()
    process = round(hardware.rss_mb() * MB)
    if shape.encoder and MODELLING in sys.modules:  # to know the shape: what it takes is counted for encoders anyway
        process -= costs.ENCODER_MODULES
    work = lay_out(lengths, config, config.batch_size or get_task(task).batch_size, supervised, padded=shape.encoder)
    return Planner(
        situation=Situation(shape, config, task, work, process, half=half),
        budget=config.ram or (hardware.available_memory() + process) // 2,
        asked=config.ram is not None,
        valid=valid or closing.guessed(lengths, supervised, config),
        threads=threads,
        matmul=matmul,
        limit=min(config.max_length or DEFAULT_LENGTH, length_limit(source.config)),
        rate=speed.REFERENCE_RATE / 1e9 / rate,
    )


def matrix_rate(threads: int, matmul: str) -> float:
    """Return GFLOP/s of fp32 matrix products on so many threads with the chosen library."""
    import torch

    from edgelora.models import gemm

    before, library = torch.get_num_threads(), gemm.library()
    torch.set_num_threads(threads)
    try:
        return gemm.rate(matmul, gemm.TOKENS, gemm.OUTPUTS, gemm.INPUTS, 0.3)
    finally:
        torch.set_num_threads(before)
        gemm.use(library)


def guess_task(source: ModelSource) -> str:
    """Return the task of a model's kind, where no rows have told."""
    from edgelora.models.families import FAMILIES

    return "text-generation" if source.config.get("model_type") in FAMILIES else "text-classification"


def lay_out(lengths: NDArray[np.int64], config: FinetuneConfig, batch_size: int, supervised: float, *, padded: bool) -> Work:
    """Cut the rows into steps and pieces as training will, and measure the pieces.

    Padded rows are computed as long as their piece's longest; packed ones without their last token, which nothing comes after.
    """
    from edgelora.train.batches import Schedule, split

    schedule = Schedule(lengths, batch_size, config.seed)
    steps = schedule.num_steps(config.epochs, config.max_steps)
    sizes = micro_batches(config, batch_size)
    where: dict[int, tuple[int, ...]] = {}
    tokens, largest = 0, dict.fromkeys(sizes, 0)
    pieces, computed = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    looked_at = min(steps, 4 * schedule.steps_per_epoch)  # later epochs are cut alike
    for step in range(looked_at):
        rows = schedule.rows(step)
        tokens += int(lengths[rows].sum())
        for size in sizes:
            for part in split(lengths, rows, size):
                count = len(part) * int(lengths[part].max()) if padded else int(lengths[part].sum()) - len(part)
                pieces[size] += 1
                computed[size] += count
                if count > largest[size]:
                    largest[size], where[size] = count, tuple(part)
    scale, later = steps / looked_at, max(0, steps - schedule.steps_per_epoch)
    loads = {
        size: Load(steps, round(pieces[size] * scale), computed[size] * scale, supervised * tokens * scale, later)
        for size in sizes
    }
    pieces_of = {size: piece_of([int(lengths[row]) for row in rows], supervised, padded=padded) for size, rows in where.items()}
    return Work(steps, round(tokens * scale), pieces_of, where, loads)


def piece_of(lengths: Sequence[int], supervised: float, *, padded: bool) -> Piece:
    """Return rows of so many tokens as one piece."""
    from edgelora.models.attention import lay_out as lay_out_documents

    targets = round(supervised * sum(lengths))
    if padded:
        return Piece(len(lengths) * max(lengths), targets, longest=max(lengths))
    starts = list(itertools.accumulate((length - 1 for length in lengths), initial=0))
    runs = lay_out_documents(starts).runs
    padding = sum(documents * length for documents, length in runs) - starts[-1]
    return Piece(starts[-1], targets, padding, joined=len(runs) > 1 or padding > 0)


def scoring_limits(shape: ModelShape, free: int) -> tuple[int, int]:
    """Return the tokens to score at once and the bytes for keys and values while generating, within `free` bytes.

    A quarter of them stays for what varies: rows are scored whole, and one prompt has its cache whatever it takes.
    """
    per_token = costs.FP32 * (3 * shape.hidden + 2 * shape.queries + 4 * shape.keys + (2 + shape.gated) * shape.inner)
    tokens = min(512, max(64, free // 4 // per_token))
    return tokens, min(64 * MB, max(4 * MB, 3 * free // 4 - tokens * per_token))


def too_little(least: Choice, budget: int, config: FinetuneConfig) -> MachineError:
    """Return the refusal, with the least that would do."""
    needed, settings = -(-round(least.peak / MARGIN) // MB), least.settings
    fixed = [
        name for name in ("base_bits", "micro_batch", "gradient_checkpointing", "optimizer_bits")
        if getattr(config, name) is not None
    ]  # fmt: skip
    how = f"{settings.base_bits}-bit base weights, {settings.micro_batch} rows at once"
    asked = f"{budget // MB} MB (--ram) are" if config.ram else f"half of the free memory, {budget // MB} MB, is"
    lines = [f"{asked} too little: this run needs at least {needed} MB ({how})"]
    lines += [f"you have set {', '.join(fixed)}, which the planner may not change"] if fixed else []
    hint = f"--ram {needed}MB, a smaller model, or shorter rows (--max-length)"
    return MachineError("\n  ".join(lines), hint=hint)
