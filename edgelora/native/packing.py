"""Weights of products as decoder.c reads them: packed once, kept in a file that is mapped from then on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.hardware import available_memory
from edgelora.native.operations import EMBED, PRODUCT, Operation, Program
from edgelora.native.program import UnknownGraphError

ALIGNMENT = 64  # bytes: a register of weights lies in one line of the processor's cache
HUGE_PAGE = 2 << 20
SMALL_PART = 1 / 8  # of the memory that is available


def packed_bytes(program: Program, library: ctypes.CDLL) -> int:
    """Return what all products of a program take when packed."""
    *_, (_, end) = products(program, library)
    return end


def products(program: Program, library: ctypes.CDLL) -> Iterator[tuple[Operation, int]]:
    """Give each product with the place where its weights end, None and 0 before the first; each begins at an ALIGNMENT."""
    end = 0
    for step in program.operations:
        if step.kind == PRODUCT:
            size = library.edgelora_packed_bytes(step.n, step.k, step.bits, step.block)
            end += -(-size // ALIGNMENT) * ALIGNMENT
            yield step, end


def use_packed(program: Program, library: ctypes.CDLL, path: Path | None) -> None:
    """Let a program's products read packed weights: those of `path`, which is written if it is not there; without a path, or
    where it cannot be written, those in memory of this process. Raises UnknownGraphError where scales are not bf16 numbers."""
    size = packed_bytes(program, library)
    found = None if path is None else mapped(path, size)
    if found is None:
        found = packed(program, library, size)
        if path is not None:
            with contextlib.suppress(OSError):
                write(path, found)
                written = mapped(path, size)
                found = found if written is None else written
    start = 0
    program.kept.append(found)
    tables = {step.codes: step for step in program.operations if step.kind == EMBED}
    for step, end in list(products(program, library)):
        table = tables.get(step.codes)
        step.codes, step.scales, start = found.ctypes.data + start, None, end
        if table is not None and (table.bits, table.block, table.k) == (step.bits, step.block, step.k):
            table.codes, table.scales = step.codes, None  # a tied head's: no page of the file is read


def packed(program: Program, library: ctypes.CDLL, size: int) -> NDArray[np.uint8]:
    found = aligned(size)
    found[:] = 0
    start = 0
    for step, end in products(program, library):
        scales = np.ctypeslib.as_array((ctypes.c_uint32 * (step.n * step.k // step.block)).from_address(step.scales))
        if (scales & 0xFFFF).any():
            raise UnknownGraphError("scales that are not bf16 numbers")
        library.edgelora_pack(
            step.codes, step.scales, step.n, step.k, step.bits, step.block, found[start:].ctypes.data if size else None
        )
        start = end
    return found


def mapped(path: Path, size: int) -> NDArray[Any] | None:
    """Return what a file holds; None where it is not there or of another size.

    It is mapped, or, where it is a small part of the memory, read: numpy asks Linux for huge pages for large arrays, and files
    have none, where every 4 KB of a token's way through the weights cost a walk through page tables (SmolLM2: a quarter more).
    """
    try:
        if path.stat().st_size != size:
            return None
        os.utime(path)  # the least recently used goes first
        if sys.platform != "linux" or size > SMALL_PART * (available_memory() or 0):
            return np.memmap(path, np.uint8, mode="r")
        room = aligned(size)
        with path.open("rb") as file:
            return room if file.readinto(room.data) == size else None
    except (OSError, ValueError):
        return None


def aligned(size: int) -> NDArray[np.uint8]:
    """Return memory that begins where a huge page can, not yet touched."""
    room = np.empty(size + HUGE_PAGE, np.uint8)
    return room[-room.ctypes.data % HUGE_PAGE :][:size]


def write(path: Path, content: NDArray[np.uint8]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.data)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
