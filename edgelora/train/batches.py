"""Which rows make up each optimizer step: rows of like length together, in an order that seed and epoch decide alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

POOL_STEPS = 32  # steps whose rows are shuffled together before they are sorted: enough to find rows of like length


class Schedule:
    """The rows of every step of a run. No state is carried over: a resumed run asks for step n and gets the same rows."""

    def __init__(self, lengths: NDArray[np.int64], batch_size: int, seed: int) -> None:
        self.lengths = lengths  # [rows], tokens of each
        self.batch_size = batch_size
        self.seed = seed
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def num_steps(self, epochs: float, max_steps: int | None) -> int:
        steps = max(1, math.ceil(self.steps_per_epoch * epochs))
        return steps if max_steps is None else min(steps, max_steps)

    def rows(self, step: int) -> list[int]:
        """Return the row numbers of a step, longest first, so that the peak of memory comes early in a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, epoch_batches(self.lengths, self.batch_size, self.seed, epoch)
        return sorted(self._epoch[1][index], key=lambda row: (-int(self.lengths[row]), row))


def epoch_batches(lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch: every row once.

    Rows are shuffled, cut into pools, sorted by length within a pool, cut into batches, and the batches shuffled.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), POOL_STEPS * batch_size):
        pool = order[start : start + POOL_STEPS * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size].tolist() for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def split(lengths: NDArray[np.int64], rows: list[int], micro_batch: int) -> list[list[int]]:
    """Cut the rows of a step into pieces computed one after the other: as many as pieces of `micro_batch` rows would be.

    The largest piece has as few tokens as it can have without moving a row: the rows stay in their order.
    """
    pieces = math.ceil(len(rows) / micro_batch)
    tokens = [int(lengths[row]) for row in rows]
    low, high = max(max(tokens), math.ceil(sum(tokens) / pieces)), sum(tokens)
    while low < high:  # the least size of a piece that so many pieces are enough for
        middle = (low + high) // 2
        low, high = (low, middle) if len(cuts(tokens, middle, 1)) <= pieces else (middle + 1, high)
    starts = cuts(tokens, low, pieces)
    return [rows[start:stop] for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True)]


def cuts(tokens: list[int], size: int, pieces: int) -> list[int]:
    """Return where pieces of at most `size` tokens begin, each as long as it can be while `pieces` in all stay possible."""
    starts, used = [0], 0
    for row, count in enumerate(tokens):
        enough_left = len(tokens) - row > pieces - len(starts)
        if row and (used + count > size or not enough_left):
            starts.append(row)
            used = 0
        used += count
    return starts
