"""`edgelora plan`: the settings that fit a budget of memory, and what they cost, before a byte is trained.

From what the user left open, the fastest settings come first; they shrink in this order until the prediction fits:
rows computed at once (8, 4, 2, 1), then gradient checkpointing, then the bits of the frozen weights (32, 16, 8, 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import costs, hardware
from edgelora.costs import ModelShape, Settings
from edgelora.errors import MachineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgelora.config import FinetuneConfig
    from edgelora.models.source import ModelSource

MB = 1 << 20
ALL_BITS = (32, 16, 8, 4)
EFFICIENCY = (
    0.45  # share of the measured matrix rate that a whole training step reaches: norms, attention and copies take the rest
)
UNPACKING = {32: 0.0, 16: 0.15e-9, 8: 0.2e-9, 4: 0.5e-9}  # seconds per weight and pass
SUPERVISED = 0.6  # share of tokens that is trained on, where the rows have not told
DEFAULT_LENGTH = 1024  # tokens of a row, where neither the user nor the model sets fewer
STEP_SECONDS = 0.03  # optimizer, clipping, log


@dataclass(frozen=True)
class Plan:
    """Settings that fit, and their predicted cost. Goes into the run's manifest and comes back on --resume."""

    base_bits: int
    micro_batch: int
    gradient_checkpointing: bool
    threads: int
    max_length: int
    predicted_peak_mb: float
    seconds: float
    budget_mb: float
    steps: int
    tokens: int
    parts: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """The rows of a run as the batches cut them."""

    steps: int
    tokens: int  # of all steps
    largest: dict[int, int]  # rows computed at once → tokens of the largest such piece
    pieces: dict[int, int]  # rows computed at once → number of pieces


def make_plan(
    source: ModelSource,
    lengths: NDArray[np.int64],
    config: FinetuneConfig,
    *,
    task: str | None = None,
    supervised: float = SUPERVISED,
) -> Plan:
    """Return the first settings in the stated order whose predicted peak fits the budget.

    lengths: tokens of each training row; supervised: their share that is trained on.
    Raises MachineError with the least that would do when none fits, SettingsError for target modules that match nothing.
    """
    from edgelora.tasks import get_task
    from edgelora.train.run import length_limit

    task = task or config.task or guess_task(source)
    batch_size = config.batch_size or get_task(task).batch_size
    shape = ModelShape.of(source, task)
    budget = config.ram or (hardware.available_memory() + round(hardware.rss_mb() * MB)) // 2
    process = round(hardware.rss_mb() * MB)
    work = lay_out(lengths, config, batch_size, padded=shape.encoder)
    tried: list[tuple[int, Settings, dict[str, int]]] = []
    for settings in candidates(shape, config, task):
        parts = costs.memory_parts(shape, settings, work.largest[settings.micro_batch], process)
        tried.append((sum(parts.values()), settings, parts))
        if tried[-1][0] <= budget:
            limit = min(config.max_length or DEFAULT_LENGTH, length_limit(source.config))
            return complete(shape, tried, work, config, budget, supervised, limit)
    raise too_little(tried, budget, config)


def guess_task(source: ModelSource) -> str:
    """Return the task of a model's kind, where no rows have told."""
    from edgelora.models.families import FAMILIES

    return "text-generation" if source.config.get("model_type") in FAMILIES else "text-classification"


def candidates(shape: ModelShape, config: FinetuneConfig, task: str) -> Iterator[Settings]:
    """Yield the settings to try, in the order of the module's docstring; what the user has set does not vary."""
    from edgelora.quant.bits import PRECISION_BITS
    from edgelora.tasks import get_task
    from edgelora.train import on_grid

    chosen = get_task(task)
    paths = [path for path, _, _ in shape.linears]
    targets = costs.targeted(paths, config.target_modules or chosen.target_modules)
    checkpointing = (False, True) if config.gradient_checkpointing is None else (config.gradient_checkpointing,)
    for bits in ALL_BITS if config.base_bits is None else (config.base_bits,):
        rounded = PRECISION_BITS[config.precision] if on_grid.applies(config, bits) else None
        for recompute in checkpointing:
            for rows in micro_batches(config, config.batch_size or chosen.batch_size):
                yield Settings(bits, rows, recompute, config.rank, targets, rounded)


def micro_batches(config: FinetuneConfig, batch_size: int) -> list[int]:
    """Return the numbers of rows computed at once to try: the whole batch, its half, and so on to 1."""
    if config.micro_batch is not None:
        return [min(config.micro_batch, batch_size)]
    sizes = [batch_size]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def lay_out(lengths: NDArray[np.int64], config: FinetuneConfig, batch_size: int, *, padded: bool) -> Work:
    """Cut the rows into steps and pieces as training will, and measure the pieces."""
    from edgelora.train.batches import Schedule, split

    schedule = Schedule(lengths, batch_size, config.seed)
    steps = schedule.num_steps(config.epochs, config.max_steps)
    sizes = micro_batches(config, batch_size)
    tokens, largest, pieces = 0, dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    looked_at = min(steps, 4 * schedule.steps_per_epoch)  # later epochs are cut alike
    for step in range(looked_at):
        rows = schedule.rows(step)
        tokens += int(lengths[rows].sum())
        for size in sizes:
            parts = split(rows, size)
            pieces[size] += len(parts)
            counts = (len(part) * int(lengths[part].max()) if padded else int(lengths[part].sum()) for part in parts)
            largest[size] = max(largest[size], *counts)
    scale = steps / looked_at
    return Work(steps, round(tokens * scale), largest, {size: round(count * scale) for size, count in pieces.items()})


def complete(
    shape: ModelShape, tried: list[tuple[int, Settings, dict[str, int]]], work: Work, config: FinetuneConfig, budget: int,
    supervised: float, limit: int,
) -> Plan:  # fmt: skip
    """Return the plan of the last settings tried."""
    peak, settings, parts = tried[-1]
    threads = config.threads or hardware.physical_cores()
    return Plan(
        base_bits=settings.base_bits,
        micro_batch=settings.micro_batch,
        gradient_checkpointing=settings.gradient_checkpointing,
        threads=threads,
        max_length=limit,
        predicted_peak_mb=round(peak / MB, 1),
        seconds=round(predict_seconds(shape, settings, work, threads, supervised), 1),
        budget_mb=round(budget / MB, 1),
        steps=work.steps,
        tokens=work.tokens,
        parts={name: round(size / MB, 1) for name, size in parts.items() if size},
        notes=explain(tried[0][1], settings, tried[0][0], budget, asked=config.ram is not None),
    )


def predict_seconds(shape: ModelShape, settings: Settings, work: Work, threads: int, supervised: float) -> float:
    """Return the seconds of the training steps, from a matrix rate measured now."""
    from edgelora.rates import fp32_rate

    operations = costs.training_operations(shape, settings, work.tokens, round(supervised * work.tokens))
    passes = 3 if settings.gradient_checkpointing else 2
    unpacking = UNPACKING[settings.base_bits] * shape.linear_weights * passes * work.pieces[settings.micro_batch]
    return operations / (fp32_rate(threads) * 1e9 * EFFICIENCY) + unpacking + STEP_SECONDS * work.steps


def explain(first: Settings, chosen: Settings, first_peak: int, budget: int, *, asked: bool) -> list[str]:
    """Return what was given up for the budget, for people."""
    notes = []
    if first != chosen:
        notes.append(f"the fastest settings would take {first_peak // MB} MB; {budget // MB} MB are allowed")
    if chosen.micro_batch != first.micro_batch:
        notes.append(f"{chosen.micro_batch} rows are computed at once instead of {first.micro_batch}; the result is the same")
    if chosen.gradient_checkpointing and not first.gradient_checkpointing:
        notes.append("activations are computed again in backward: about a third slower")
    if chosen.base_bits != first.base_bits:
        notes.append(f"the frozen weights are kept in {chosen.base_bits} bits instead of {first.base_bits}")
    if not asked:
        notes.append("the budget is half of what is free; --ram sets it")
    return notes


def too_little(tried: list[tuple[int, Settings, dict[str, int]]], budget: int, config: FinetuneConfig) -> MachineError:
    """Return the refusal, with the least that would do."""
    peak, settings, _ = min(tried, key=lambda entry: entry[0])
    least = -(-peak // MB)
    how = f"{settings.base_bits}-bit weights, {settings.micro_batch} row(s) at once"
    how += ", activations recomputed" if settings.gradient_checkpointing else ""
    named = "--ram" if config.ram is not None else "half of the free memory"
    fixed = [name for name in ("base_bits", "micro_batch", "gradient_checkpointing") if getattr(config, name) is not None]
    message = f"{budget // MB} MB ({named}) are too little: this run needs at least {least} MB ({how})"
    if fixed:
        message += f"; you have set {', '.join(fixed)}, which the planner may not change"
    return MachineError(message, hint=f"--ram {least}MB, shorter rows (--max-length, --truncate), or a smaller model")


def plan(model: str, data: str, config: FinetuneConfig) -> dict[str, Any]:
    """Return {"peak_mb", "seconds", "settings", …} of a run that is not made; the rows are read and tokenized for it.

    Raises what `finetune` would: DataError, ModelError, SettingsError, MachineError.
    """
    import tempfile

    import edgelora.train.finetune  # noqa: F401  what a run imports is part of its memory
    from edgelora.data.prepare import prepare
    from edgelora.models.source import open_model
    from edgelora.train.run import length_limit

    source = open_model(model, trust_remote_code=config.trust_remote_code)
    with tempfile.TemporaryDirectory() as folder:
        longest = min(config.max_length or DEFAULT_LENGTH, length_limit(source.config))
        prepared = prepare(data, source.folder, Path(folder) / "data", config, max_length=longest)
        share = prepared.supervised["train"] / prepared.tokens["train"]
        lengths = prepared.store("train").lengths
        made = make_plan(source, lengths, config, task=prepared.task, supervised=share)
        rows = len(lengths)
        del lengths  # Windows does not remove a mapped file
    names = ("base_bits", "micro_batch", "gradient_checkpointing", "threads", "max_length")
    return {
        "peak_mb": made.predicted_peak_mb,
        "seconds": made.seconds,
        "settings": {"task": prepared.task, **{name: getattr(made, name) for name in names}},
        "rows": rows,
        "steps": made.steps,
        "tokens": made.tokens,
        "budget_mb": made.budget_mb,
        "parts": made.parts,
        "notes": made.notes,
        "model": source.reference,
        "config": dataclasses.asdict(config),
    }
