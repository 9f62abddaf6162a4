"""The frozen prefix: what the blocks below the lowest adapter compute of a row never changes, so it is computed once.

It is kept on disk in fp32, in a file of the run folder that goes away with the checkpoint, and read piece by piece: mapped, its
pages would count as the process's memory. The states are those that the row had in its first batch. Computed again in other
company their last bits may differ, for attention takes documents of like length together; a resumed run keeps them if it did.

Decoders alone: an encoder's own dropout draws anew in each epoch, in the frozen layers too.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelora import console
from edgelora.models.predictor import Collate, TorchPredictor
from edgelora.train.checkpoint import raw

if TYPE_CHECKING:
    from edgelora.train.batches import Schedule

TRAIN, VALID = "prefix.train", "prefix.valid"  # the files, in the folder of the checkpoint
SPARE = 512 << 20  # bytes of the disk that are left to others
FP32 = 4


def frozen_blocks(model: Any) -> int:
    """Return how many of the first blocks of a decoder have nothing that is trained; 0 for other models."""
    blocks = getattr(model, "blocks", ())
    trained = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    return trained.index(True) if any(trained) else 0


class Prefix:
    """What the first `blocks` blocks of a decoder give for each of a number of rows, on disk.

    model: a Decoder; lengths: tokens of each row, at least as many as a batch has of it; done: rows that the file holds.
    """

    def __init__(self, model: Any, blocks: int, path: Path, lengths: NDArray[np.int64], *, done: Iterable[int] = ()) -> None:
        self.model, self.blocks, self.path = model, blocks, path
        self.width = model.spec.hidden_size
        ends = np.cumsum(lengths, dtype=np.int64) * (FP32 * self.width)
        self.offsets = np.concatenate([[0], ends])
        self.held = np.zeros(len(lengths), dtype=bool)
        self.writes = True
        found = path.is_file() and path.stat().st_size == self.num_bytes
        path.parent.mkdir(exist_ok=True)
        self.file = path.open("r+b" if found else "w+b", buffering=0)
        self.file.truncate(self.num_bytes)  # a file with holes: the size is there before the content
        if found:
            self.held[list(done)] = True

    @property
    def num_bytes(self) -> int:
        return int(self.offsets[-1])

    def hidden(self, rows: Sequence[int], ids_T: Tensor, starts: Tensor) -> Tensor:
        """Return the last hidden states `[T, H]` of packed rows, their prefix read, or computed and written."""
        states: Tensor = self.model.hidden(ids_T, starts, prefix=(self.blocks, self.states(rows, ids_T, starts)))
        return states

    @torch.no_grad()
    def states(self, rows: Sequence[int], ids_T: Tensor, starts: Tensor) -> Tensor:
        """Return the hidden states `[T, H]` after the prefix."""
        bounds = starts.tolist()
        if self.held[list(rows)].all():
            states_TH = torch.empty(bounds[-1], self.width)
            for row, start, stop in zip(rows, bounds, bounds[1:], strict=False):
                self._read(row, states_TH[start:stop])
            return states_TH
        computed_TH: Tensor = self.model.prefix(ids_T, starts, self.blocks)
        if self.writes:
            try:
                for row, start, stop in zip(rows, bounds, bounds[1:], strict=False):
                    self._write(row, computed_TH[start:stop])
            except OSError as error:
                self._give_up(error)
        return computed_TH

    def _write(self, row: int, states_TH: Tensor) -> None:
        self.file.seek(int(self.offsets[row]))
        rest = raw(states_TH)
        while rest:
            rest = rest[self.file.write(rest) :]
        self.held[row] = True

    def _read(self, row: int, states_TH: Tensor) -> None:
        self.file.seek(int(self.offsets[row]))
        rest = raw(states_TH)
        while rest:
            count = self.file.readinto(rest)
            assert count, f"{self.path} is shorter than it was"
            rest = rest[count:]

    def _give_up(self, error: OSError) -> None:
        """Go on without the file on a full disk, and leave its room to the checkpoints."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise error
        console.warn("the disk is full: the frozen layers are computed again in every epoch")
        self.writes = False
        self.held[:] = False
        self.file.truncate(0)

    def sync(self) -> None:
        """Wait until everything is on the disk: a checkpoint counts on the rows of its steps."""
        os.fsync(self.file.fileno())

    def close(self, *, remove: bool = True) -> None:
        self.file.close()
        if remove:
            self.path.unlink(missing_ok=True)


class Prefixed:
    """A decoder as a task's loss sees it: the batch consists of `rows`."""

    def __init__(self, prefix: Prefix, rows: Sequence[int]) -> None:
        self.prefix, self.rows = prefix, rows

    def hidden(self, ids_T: Tensor, starts: Tensor) -> Tensor:
        return self.prefix.hidden(self.rows, ids_T, starts)

    def nll(self, hidden_SH: Tensor, targets_S: Tensor) -> Tensor:
        loss: Tensor = self.prefix.model.nll(hidden_SH, targets_S)
        return loss


class PrefixedPredictor(TorchPredictor):
    """A predictor for always the same examples, whose losses go by their prefix."""

    def __init__(self, prefix: Prefix, collate: Collate, **limits: int) -> None:
        super().__init__(prefix.model, collate, **limits)
        self.prefix = prefix

    def hidden(self, numbers: list[int], batch: dict[str, Tensor]) -> Tensor:
        return self.prefix.hidden(numbers, batch["ids"], batch["starts"])


@dataclass(frozen=True)
class Prefixes:
    """Those of the training rows, where they are used more than once, and of the validation rows."""

    train: Prefix | None
    valid: Prefix

    def close(self, *, remove: bool) -> None:
        for prefix in (self.train, self.valid):
            if prefix is not None:
                prefix.close(remove=remove)


def open_prefixes(
    folder: Path, model: Any, schedule: Schedule, valid_lengths: NDArray[np.int64], *, num_steps: int, step: int
) -> Prefixes | None:
    """Return the files of a run that has done `step` steps; None where nothing is frozen below, or the disk is too small."""
    blocks = frozen_blocks(model)
    if not blocks or not hasattr(model, "prefix"):
        return None
    train, valid = folder / TRAIN, folder / VALID
    again = num_steps > schedule.steps_per_epoch
    tokens = int(valid_lengths.sum()) + (int(schedule.lengths.sum()) if again else 0)
    needed = tokens * FP32 * model.spec.hidden_size
    folder.mkdir(exist_ok=True)
    free = shutil.disk_usage(folder).free + sum(allocated(path) for path in (train, valid)) - SPARE
    if needed > free:
        console.warn(
            f"what the first {blocks} layers compute of each row would take {needed >> 20} MB of disk, {max(0, free) >> 20} MB "
            "are free: it is computed again in every epoch"
        )
        return None
    console.say(f"what the first {blocks} layers compute of each row is kept on disk: {needed >> 20} MB")
    done = [row for n in range(min(step, schedule.steps_per_epoch)) for row in schedule.rows(n)]
    return Prefixes(
        Prefix(model, blocks, train, schedule.lengths, done=done) if again else None,
        Prefix(model, blocks, valid, valid_lengths),
    )


def allocated(path: Path) -> int:
    """Return the bytes of the disk that a file takes, without its holes."""
    return int(getattr(path.stat(), "st_blocks", 0)) * 512 if path.is_file() else 0
