"""Settings of the C allocator for a process that trains: what is freed goes back to the system.

glibc raises the size from which blocks get mappings of their own each time such a block is freed (mallopt(3), "dynamic mmap
threshold"), up to 32 MB: after a few steps every activation lives in the heap, between blocks that stay, and the heap never
shrinks. A fixed threshold keeps large blocks apart. Its price is a page fault for each 4 KB that is touched again.

Linux with glibc only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

ENVIRONMENT = "EDGELORA_ALLOCATOR"
# malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8


@dataclass(frozen=True)
class Allocator:
    """mmap_threshold: bytes from which a block is a mapping of its own; trim_threshold: bytes free at the heap's end that are
    kept; arenas: heaps that threads share, 0 for glibc's choice of 8 per core. What is None stays glibc's own."""

    mmap_threshold: int | None = 1 << 20
    trim_threshold: int | None = 1 << 20
    arenas: int = 1
    huge_pages: bool = False

    @classmethod
    def from_environment(cls) -> Allocator | None:
        """Return what EDGELORA_ALLOCATOR says, for comparisons: "off", or pairs such as "mmap_threshold=131072,arenas=2"."""
        text = os.environ.get(ENVIRONMENT, "").strip()
        if text == "off":
            return None
        pairs = (pair.partition("=") for pair in text.split(",") if pair)
        return cls(**{name.strip(): int(value) for name, _, value in pairs})  # type: ignore[arg-type]


def settle(allocator: Allocator | None = None) -> bool:
    """Set the allocator of this process up and tell whether that was done. Call it before torch is imported.

    Without an argument: the defaults of Allocator, or those of the environment variable EDGELORA_ALLOCATOR.
    """
    allocator = allocator or Allocator.from_environment()
    if allocator is None:
        return False
    if allocator.huge_pages:
        # torch asks for huge pages for blocks of 2 MB and more (c10/core/impl/alloc_cpu.cpp); read when it first allocates.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = _glibc()
    if libc is None:
        return False
    values = {
        MMAP_THRESHOLD: allocator.mmap_threshold,
        TRIM_THRESHOLD: allocator.trim_threshold,
        TOP_PAD: 1 << 16 if allocator.trim_threshold is not None else None,
        ARENA_MAX: allocator.arenas or None,
    }
    done = [libc.mallopt(name, value) == 1 for name, value in values.items() if value is not None]
    return all(done)


def trim() -> None:
    """Give back the free pages of the heap: after a stage whose small blocks are gone."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
