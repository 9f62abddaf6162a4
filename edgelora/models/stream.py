"""Streaming through the mapped base file: a block's pages are asked for before it is computed and given back after it.

    enter(i)   unmaps what else is mapped, and asks the system to read the block after i while i is computed
    leave(i)   unmaps block i; these are clean pages of a file, so nothing is written and nothing is lost

What the system keeps of the file beyond that is cache that it takes back when memory is short. Blocks are walked there and
back (forward, backward), so the last ones read are the first ones needed again, and cache that happens to be free is used.
Dropping that cache too (posix_fadvise) read a quarter more where a fifth of the file could stay, and would read all of it
again where it fits. Where less than half of it could stay, `fit_cache` has it dropped all the same: such a cache is read
again and again without a hit, and the system, which sees that, takes the pages of libraries for it, which are in use.
Without `madvise` (Windows) all of this does nothing: the system drops clean pages by itself.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

Range = tuple[int, int]  # [start, stop) in bytes; starts are multiples of the page size
WORTH_KEEPING = 0.5  # of the file


class Stream:
    """The blocks and the tables (embedding, LM head) of a mapped base file."""

    def __init__(self, mapping: mmap.mmap, blocks: Sequence[Range], tables: Sequence[Range], path: Path | None = None) -> None:
        self._mapping, self._path = mapping, path
        self._file: int | None = None  # open where its cache is dropped
        self.blocks = list(blocks)
        self.tables = list(tables)
        self._last: int | None = None
        self._direction = 1
        # Pages that were read in sequence are not counted as used again when they are unmapped: others' stay longer.
        self._advise("MADV_SEQUENTIAL", (0, len(mapping)))

    @property
    def window_bytes(self) -> int:
        """The most that is asked for at once: the block being computed and the one after it."""
        sizes = [stop - start for start, stop in self.blocks]
        return max((a + b for a, b in zip(sizes, sizes[1:] or [0], strict=False)), default=0)

    def fit_cache(self, room: int) -> None:
        """Keep no cache of the file where only so many bytes of memory are left for it, and those are too few."""
        if self._path is None or self._file is not None or not hasattr(os, "posix_fadvise"):
            return
        if room < WORTH_KEEPING * len(self._mapping):
            try:
                self._file = os.open(self._path, os.O_RDONLY)
            except OSError:  # another process has removed the file, which stays mapped here
                return
            weakref.finalize(self, os.close, self._file)

    def enter(self, block: int) -> None:
        """Call it before a block is computed, forward or backward."""
        self._turn(block)
        start, stop = self.blocks[block]
        # All the rest, not the last block only: backward may have touched a block again after it was left.
        self._advise("MADV_DONTNEED", (0, start))
        self._advise("MADV_DONTNEED", (-(-stop // mmap.PAGESIZE) * mmap.PAGESIZE, len(self._mapping)))
        for number in (block, block + self._direction):
            if 0 <= number < len(self.blocks):
                self._advise("MADV_WILLNEED", self.blocks[number])

    def leave(self, block: int) -> None:
        """Call it when a block's weights are not needed until the next pass."""
        self._release(self.blocks[block])

    def drop_table(self) -> None:
        """Call it after the embedding or the LM head was used, or a tile of it."""
        for table in self.tables:
            self._release(table)

    def _release(self, part: Range) -> None:
        self._advise("MADV_DONTNEED", part)
        if self._file is not None:
            os.posix_fadvise(self._file, part[0], part[1] - part[0], os.POSIX_FADV_DONTNEED)

    def _turn(self, block: int) -> None:
        """Infer the direction: a block entered twice is where a pass turns; the first block is where one begins."""
        if self._last is None or block == 0 or block > self._last:
            self._direction = 1
        elif block < self._last:
            self._direction = -1
        else:
            self._direction = -self._direction
        self._last = block

    def _advise(self, advice: str, part: Range) -> None:
        if part[0] < part[1] and hasattr(self._mapping, "madvise") and hasattr(mmap, advice):
            self._mapping.madvise(getattr(mmap, advice), part[0], part[1] - part[0])


def in_turn(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a streamed model, each while it is in memory; of another the model itself."""
    stream: Stream | None = getattr(model, "stream", None)
    if stream is None:
        yield model
        return
    for index, block in enumerate(model.get_submodule("blocks").children()):
        stream.enter(index)
        yield block
        stream.leave(index)
