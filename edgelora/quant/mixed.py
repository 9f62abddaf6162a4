"""Which layer gets how many bits and which block size, when all together may take so many bytes.

Every layer (or layers that share an input, so that they stay one product) has options: bytes, and by how much each is thought
to raise the loss. Starting from the smallest, the step that gains most loss for its bytes comes next, along the lower convex
hull of each layer's options: the greedy solution of the knapsack, short of the best by less than one step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgelora.quant.bits import Choice


@dataclass(frozen=True)
class Option:
    """choice: how the layers are stored. rise: of the loss, predicted."""

    choice: Choice
    num_bytes: int
    rise: float


Assignment = dict[str, Option]  # by the name of the group of layers


def frontier(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of (bytes, rise), smallest first: each step gains less than the last."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.num_bytes, option.rise)):
        if hull and option.rise >= hull[-1].rise:
            continue
        while len(hull) > 1 and gain(hull[-2], option) >= gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def gain(small: Option, large: Option) -> float:
    """Return the fall of the loss per byte."""
    return (small.rise - large.rise) / max(large.num_bytes - small.num_bytes, 1)


def ladder(groups: Mapping[str, Sequence[Option]]) -> list[Assignment]:
    """Return the assignments from the smallest to the one of least loss, each one step above the last."""
    hulls = {name: frontier(options) for name, options in groups.items()}
    now = {name: hull[0] for name, hull in hulls.items()}
    steps = [(gain(small, large), name, large) for name, hull in hulls.items() for small, large in itertools.pairwise(hull)]
    rungs = [dict(now)]
    for _, name, option in sorted(steps, key=lambda step: (-step[0], step[1], step[2].num_bytes)):
        now[name] = option
        rungs.append(dict(now))
    return rungs


def num_bytes(assignment: Mapping[str, Option]) -> int:
    return sum(option.num_bytes for option in assignment.values())


def rise(assignment: Mapping[str, Option]) -> float:
    return sum(option.rise for option in assignment.values())


def largest_within(rungs: Sequence[Assignment], limit: int) -> int | None:
    """Return the number of the last rung of at most `limit` bytes; None if even the first takes more."""
    within = [number for number, rung in enumerate(rungs) if num_bytes(rung) <= limit]
    return within[-1] if within else None
