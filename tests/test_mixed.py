"""The choice of bits and block sizes under a limit."""

from __future__ import annotations

import itertools
import random

import pytest

from edgelora.quant.bits import Choice
from edgelora.quant.grid import quantize
from edgelora.quant.mixed import Option, frontier, gain, ladder, largest_within, num_bytes, rise

CHOICES = (Choice(4, 128), Choice(4, 64), Choice(4, 32), Choice(8, 64))


def some_groups(count: int) -> dict[str, list[Option]]:
    random.seed(0)
    groups = {}
    for i in range(count):
        size, cost = random.randint(10, 100), random.random()
        sizes = (size * 4, size * 4 + size // 3, size * 5, size * 9)
        rises = (cost, cost * random.uniform(0.5, 1.0), cost * random.uniform(0.3, 0.9), cost * 0.01)
        groups[f"layer{i}"] = [Option(c, b, r) for c, b, r in zip(CHOICES, sizes, rises, strict=True)]
    return groups


def test_bytes_are_those_that_the_grid_takes() -> None:
    import torch

    for choice in CHOICES:
        assert choice.num_bytes(6, 200) == quantize(torch.randn(6, 200), choice.bits, choice.block_size).num_bytes


def test_a_frontier_gains_less_with_each_step_and_misses_nothing_below_it() -> None:
    for options in some_groups(50).values():
        hull = frontier(options)
        gains = [gain(small, large) for small, large in itertools.pairwise(hull)]
        assert gains == sorted(gains, reverse=True)
        assert min(options, key=lambda o: o.num_bytes) in hull
        assert min(options, key=lambda o: o.rise) in hull


def test_rungs_grow_and_lose_less_with_each_step() -> None:
    rungs = ladder(some_groups(12))
    sizes, rises = [num_bytes(rung) for rung in rungs], [rise(rung) for rung in rungs]
    assert sizes == sorted(sizes)
    assert rises == sorted(rises, reverse=True)
    assert {option.choice.bits for option in rungs[-1].values()} == {8}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_choice_keeps_the_limit_and_is_near_the_best(share: float) -> None:
    groups = some_groups(5)
    rungs = ladder(groups)
    least, most = num_bytes(rungs[0]), num_bytes(rungs[-1])
    limit = round(least + share * (most - least))
    number = largest_within(rungs, limit)
    assert number is not None
    found = rungs[number]
    assert num_bytes(found) <= limit
    every = [dict(zip(groups, options, strict=True)) for options in itertools.product(*groups.values())]
    best = min(rise(assignment) for assignment in every if num_bytes(assignment) <= limit)
    step = max(option.rise for options in groups.values() for option in options)
    assert best <= rise(found) <= best + step


def test_a_limit_below_the_smallest_has_no_choice() -> None:
    rungs = ladder(some_groups(3))
    assert largest_within(rungs, num_bytes(rungs[0]) - 1) is None
