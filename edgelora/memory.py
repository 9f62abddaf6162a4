"""Settings of the C allocator and of oneDNN's caches for a process that trains: what is freed goes back to the system.

glibc raises the size from which blocks get mappings of their own each time such a block is freed (mallopt(3), "dynamic mmap
threshold"), up to 32 MB: after a few steps every activation lives in the heap, between blocks that stay, and the heap never
shrinks. With the threshold at its highest all blocks are in one heap, whose free end is given back from 32 MB on. A lower
threshold keeps large blocks apart, and costs a page fault for each 4 KB that is touched again: SmolLM2, 512 tokens, 1 MB
against 32 MB: 30 MB less at the peak, and 60% more time.

oneDNN keeps 1024 compiled matrix products, one for each shape, and torch's binding of it (ideep) as many of its own: 6.5 MB for
each new number of tokens, measured with the layers of SmolLM2, 260 MB after 40 of them. A step uses some 20 products, so a
small cache loses nothing that is soon used again.

The allocator is set on Linux with glibc only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = "EDGELORA_ALLOCATOR"
MADV_DONTNEED = 4  # mman.h
# malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8


@dataclass(frozen=True)
class Allocator:
    """mmap_threshold: bytes from which a block is a mapping of its own; trim_threshold: bytes free at the heap's end that are
    kept; arenas: heaps that threads share, 0 for glibc's choice of 8 per core; None: glibc's own choice."""

    mmap_threshold: int | None = 1 << 25
    trim_threshold: int | None = 1 << 25
    arenas: int = 1
    huge_pages: bool = False
    products: int = 48  # compiled products that oneDNN and ideep keep; 0 for their own choice

    @classmethod
    def from_environment(cls) -> Allocator | None:
        """Return what EDGELORA_ALLOCATOR says, for comparisons: "off", or pairs such as "mmap_threshold=131072,arenas=2"."""
        text = os.environ.get(ENVIRONMENT, "").strip()
        if text == "off":
            return None
        pairs = (pair.partition("=") for pair in text.split(",") if pair)
        return cls(**{name.strip(): int(value) for name, _, value in pairs})  # type: ignore[arg-type]


def settle(allocator: Allocator | None = None) -> bool:
    """Set the allocator of this process up and tell whether that was done. Call it before torch computes.

    Without an argument: the defaults of Allocator, or those of the environment variable EDGELORA_ALLOCATOR.
    """
    allocator = allocator or Allocator.from_environment()
    if allocator is None:
        return False
    if allocator.huge_pages:
        # torch asks for huge pages for blocks of 2 MB and more (c10/core/impl/alloc_cpu.cpp); read when it first allocates.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if allocator.products:
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
            os.environ.setdefault(name, str(allocator.products))
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


def forget_code() -> None:
    """Give back the pages of libraries' code: most were needed to start up, and what is needed again comes back by itself.

    Executable mappings of files alone: they are never written to, so that nothing can be lost (madvise(2), MADV_DONTNEED).
    """
    libc = _glibc()
    if libc is None:
        return
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if fields[1].startswith("r-x") and len(fields) == 6 and fields[5].startswith("/"):
            start, stop = (int(number, 16) for number in fields[0].split("-"))
            libc.madvise(start, stop - start, MADV_DONTNEED)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
