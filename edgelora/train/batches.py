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


def split(rows: list[int], micro_batch: int) -> list[list[int]]:
    """Cut the rows of a step into pieces computed one after the other; sizes differ by at most one row."""
    pieces = math.ceil(len(rows) / micro_batch)
    return [piece.tolist() for piece in np.array_split(np.array(rows), pieces)]
