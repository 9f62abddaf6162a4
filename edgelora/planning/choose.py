"""The planner's choice: of the settings that fit the budget, the fastest by the model of speed.py; nothing is measured here.

What the user left open shrinks in this order, and a later line is looked at only when nothing of the earlier ones fits:

1. rows computed at once, blocks computed again in backward (one by one, the first ones first), keeping in bf16, bits of the
   frozen weights, streaming (they are dropped from memory after each use and read again): among these the fastest counts, and
   of two within a hundredth the one with more bits and more rows
2. where training on the grid that ships begins, and what it learns beside the adapters: the model's own weights, scales that
   follow from each block
3. training on the grid itself, which needs frozen weights of at least 8 bits: 4 bits
4. block inputs in a scratch file
5. moments of the optimizer in 8 bits
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgelora.planning import costs, speed
from edgelora.planning.costs import Correction, Piece, Settings
from edgelora.planning.shape import ModelShape, targeted
from edgelora.planning.speed import Load

if TYPE_CHECKING:
    from edgelora.config import FinetuneConfig

ALL_BITS = (32, 16, 8, 4)
MARGIN = 0.95  # share of the budget that a prediction may fill: the heap grows a little over the first steps
FASTER = 0.99  # what is less preferred must take at most this share of the time


@dataclass(frozen=True)
class Work:
    """The rows of a run as the batches cut them, by the number of rows computed at once."""

    steps: int
    tokens: int  # of all steps, without padding
    largest: dict[int, Piece]
    rows: dict[int, tuple[int, ...]]  # of the largest pieces
    loads: dict[int, Load]


@dataclass(frozen=True)
class Choice:
    """Settings, the bytes of each part of the process at its peak, and seconds of training on the reference machine."""

    settings: Settings
    parts: dict[str, int]
    seconds: float

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Situation:
    """What the settings are chosen for."""

    shape: ModelShape
    config: FinetuneConfig
    task: str
    work: Work
    process: int  # bytes of the process before the model is read
    correction: Correction = field(default_factory=Correction)
    half: bool = False  # products with frozen weights take bf16 operands

    def judge(self, settings: Settings) -> Choice:
        piece = self.work.largest[settings.micro_batch]
        parts = costs.memory_parts(self.shape, settings, piece, self.process, self.correction)
        return Choice(settings, parts, speed.training_seconds(self.shape, settings, self.work.loads[settings.micro_batch]))


def choose(situation: Situation, budget: int) -> tuple[Choice | None, Choice, Choice]:
    """Return the choice (None where nothing fits), what it would be without a budget, and the settings of the least memory."""
    wanted = fastest(situation, [Line()], None)
    assert wanted is not None
    chosen = next((found for line in lines(situation.config) if (found := fastest(situation, line, budget)) is not None), None)
    return chosen, wanted, least(situation)


@dataclass(frozen=True)
class Line:
    """What may be given up: one line of the module's docstring."""

    plain_grid: bool = False  # as off_grid makes it too
    off_grid: bool = False
    keep_in_file: bool = False
    optimizer_bits: int = 32
    stream: bool = False


def lines(config: FinetuneConfig) -> list[list[Line]]:
    """Return the lines of the docstring in order; one that the user's settings rule out gives no candidates."""
    bits = config.optimizer_bits or 8
    ways = (False, True)
    return [
        [Line(stream=stream) for stream in ways],
        [Line(plain_grid=True, stream=stream) for stream in ways],
        [Line(off_grid=True, stream=stream) for stream in ways],
        [Line(plain_grid=True, off_grid=off, keep_in_file=True, stream=stream) for off in ways for stream in ways],
        [Line(off_grid=True, keep_in_file=keep, optimizer_bits=bits, stream=stream) for keep in ways for stream in ways],
    ]


def fastest(situation: Situation, allowed: list[Line], budget: int | None) -> Choice | None:
    """Return the fastest choice of some lines that fits."""
    best: Choice | None = None
    for line in allowed:
        for settings in candidates(situation, line):
            found = fitted(situation, settings, budget)
            if found is not None and (best is None or found.seconds < FASTER * best.seconds):
                best = found
    return best


def candidates(situation: Situation, line: Line) -> Iterator[Settings]:
    """Yield the settings of a line that keep all they may, the preferred ones first; what the user has set does not vary."""
    from edgelora.adapters.initialize import FROM_WEIGHT
    from edgelora.quant.bits import PRECISION_BITS
    from edgelora.tasks import get_task
    from edgelora.train import on_grid
    from edgelora.train.targets import target_modules

    config, shape, chosen = situation.config, situation.shape, get_task(situation.task)
    wanted = target_modules([path for path, _, _ in shape.linears], config, situation.task, shape.convolutions)
    targets = targeted(shape, wanted, config.rank if config.method == "lora" else 0, config.rank_pattern)
    optimizer_bits = config.optimizer_bits or line.optimizer_bits
    if line.stream and (shape.encoder or shape.merged_bytes is not None):
        return  # decoders alone are streamed, from a file that is made for it
    # A kept block's weights would come back in backward and stay.
    kept = 0 if config.gradient_checkpointing or line.stream else shape.layers
    for bits in base_bits(shape, config):
        rounded = PRECISION_BITS[config.precision] if on_grid.applies(config, bits) else None
        plain = line.plain_grid or line.off_grid or shape.encoder  # of decoders it was measured to help
        started = rounded is not None and on_grid.starts_apart(config, plain=plain)
        learned = rounded is not None and on_grid.learns_scales(config, plain=plain)
        loses_grid = config.base_bits is None and rounded is None and any(on_grid.applies(config, other) for other in ALL_BITS)
        if loses_grid and not line.off_grid:
            continue
        for keep_bits in (32, 16):
            for rows in micro_batches(config, config.batch_size or chosen.batch_size):
                yield Settings(
                    bits, rows, kept, keep_bits, line.keep_in_file, line.stream, optimizer_bits, targets, rounded,
                    grid_start=started, grid_scales=learned, from_weight=config.init in FROM_WEIGHT, half=situation.half,
                )  # fmt: skip


def given_up(settings: Settings) -> tuple[bool, ...]:
    """Return what of the later lines settings give up, the last line first."""
    plain = not settings.grid_start, not settings.grid_scales
    return settings.stream, settings.optimizer_bits < 32, settings.keep_in_file, *plain


def base_bits(shape: ModelShape, config: FinetuneConfig) -> tuple[int, ...]:
    """Return the bits of the frozen weights to try; a model that is on the grid already has its own."""
    from edgelora.quant.bits import PRECISION_BITS

    if config.base_bits is not None:
        return (config.base_bits,)
    if config.method == "scales" and shape.merged_bytes is None:
        return (PRECISION_BITS[config.precision] or 32,)  # the integers that ship
    return (32,) if shape.merged_bytes is not None else ALL_BITS


def fitted(situation: Situation, settings: Settings, budget: int | None) -> Choice | None:
    """Return the settings with as many kept blocks as fit, or None where not even recomputing all does."""
    checkpointing, trained = situation.config.gradient_checkpointing, costs.trained_blocks(situation.shape, settings)
    fewest = trained if checkpointing is False else 0
    for kept in range(min(settings.kept_blocks, trained), fewest - 1, -1):
        if settings.keep_in_file and kept == trained:
            continue  # no block is computed again: nothing would go to the file
        found = situation.judge(dataclasses.replace(settings, kept_blocks=kept))
        if budget is None or found.peak <= MARGIN * budget:
            return found
    return None


def least(situation: Situation) -> Choice:
    """Return the settings of the least memory."""
    found = []
    for line in (line for allowed in lines(situation.config) for line in allowed):
        for settings in candidates(situation, line):
            # The last block is whole in memory anyway when its backward comes: to keep it alone is the least.
            fewest = {None: min(1, settings.kept_blocks), True: 0, False: settings.kept_blocks}
            kept = fewest[situation.config.gradient_checkpointing]
            found.append(situation.judge(dataclasses.replace(settings, kept_blocks=kept)))
    return min(found, key=lambda choice: (choice.peak, choice.seconds))


def micro_batches(config: FinetuneConfig, batch_size: int) -> list[int]:
    """Return the numbers of rows computed at once to try: the whole batch, its half, and so on to 1."""
    if config.micro_batch is not None:
        return [min(config.micro_batch, batch_size)]
    sizes = [batch_size]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def explain(first: Settings, chosen: Settings, shape: ModelShape) -> list[str]:
    """Return what was given up for the budget, for people, in the stated order."""
    notes = []
    if chosen.micro_batch != first.micro_batch:
        notes.append(f"{chosen.micro_batch} rows are computed at once instead of {first.micro_batch}; the result is the same")
    again, before = costs.recomputed_blocks(shape, chosen), costs.recomputed_blocks(shape, first)
    if again > before:
        notes.append(f"{again} of {shape.layers} blocks are computed again in backward; the result is the same")
    if chosen.keep_bits != first.keep_bits:
        notes.append("what is kept for backward is kept in bf16: gradients differ by up to a hundredth")
    if chosen.base_bits != first.base_bits:
        notes.append(f"the frozen weights are kept in {chosen.base_bits} bits instead of {first.base_bits}")
    if chosen.grid_bits and (plain := [text for text, gone in lost_beside(first, chosen).items() if gone]):
        notes.append(f"trained on the grid without {' and '.join(plain)}: at some loss")
    if first.grid_bits and not chosen.grid_bits:
        notes.append("not trained on the grid that ships: rounding comes after, at some loss")
    if chosen.keep_in_file:
        notes.append("inputs of the blocks that are computed again are kept in a scratch file")
    if chosen.optimizer_bits != first.optimizer_bits:
        notes.append(f"the optimizer's moments are kept in {chosen.optimizer_bits} bits instead of {first.optimizer_bits}")
    return notes


def lost_beside(first: Settings, chosen: Settings) -> dict[str, bool]:
    """Return what goes with training on the grid, and whether it was given up."""
    return {
        "learning block scales": first.grid_scales and not chosen.grid_scales,
        "a start that makes up for rounding errors": first.grid_start and not chosen.grid_start,
    }
