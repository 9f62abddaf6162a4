"""Weights of products as decoder.c reads them: packed once, kept in a file that is mapped from then on."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import MachineError
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


def use_packed(
    program: Program, library: ctypes.CDLL, path: Path | None, release: Callable[[], None]
) -> Callable[[], None] | None:
    """Let a program's products read packed weights: those of `path`, which is written if it is not there; without a path, or
    where it cannot be written, those in memory of this process. Return what has to be called before they are used.

    `release` gives back the memory of the weights that were packed. Raises UnknownGraphError where scales are not bf16 numbers.
    """
    size = packed_bytes(program, library)
    opened = None
    if path is not None:
        opened = open_file(path, size)
        if opened is None:
            with contextlib.suppress(OSError):
                write(path, program, library, release)
                opened = open_file(path, size)
    found, reading = opened or (packed(program, library, size), None)
    start = 0
    program.kept.append(found)
    tables = {step.codes: step for step in program.operations if step.kind == EMBED}
    for step, end in list(products(program, library)):
        table = tables.get(step.codes)
        step.codes, step.scales, start = found.ctypes.data + start, None, end
        if table is not None and (table.bits, table.block, table.k) == (step.bits, step.block, step.k):
            table.codes, table.scales = step.codes, None  # a tied head's: no page of the file is read
    return reading


def packed(program: Program, library: ctypes.CDLL, size: int) -> NDArray[np.uint8]:
    found, start = aligned(size), 0
    for step, end in products(program, library):
        pack(step, library, found[start:end])
        start = end
    return found


def pack(step: Operation, library: ctypes.CDLL, room: NDArray[np.uint8]) -> None:
    """Write a product's weights to `room`. Raises UnknownGraphError where scales are not bf16 numbers."""
    scales = np.ctypeslib.as_array((ctypes.c_uint32 * (step.n * step.k // step.block)).from_address(step.scales))
    if (scales & 0xFFFF).any():
        raise UnknownGraphError("scales that are not bf16 numbers")
    room[:] = 0
    library.edgelora_pack(step.codes, step.scales, step.n, step.k, step.bits, step.block, room.ctypes.data)


def open_file(path: Path, size: int) -> tuple[NDArray[Any], Callable[[], None] | None] | None:
    """Return what a file holds, and what has to be called before it is there; None where there is no such file of that size.

    It is mapped, or, where it is a small part of the memory, read: numpy asks Linux for huge pages for large arrays, and files
    have none, where every 4 KB of a token's way through the weights cost a walk through page tables (SmolLM2: a quarter more).
    """
    try:
        if path.stat().st_size != size:
            return None
        os.utime(path)  # the least recently used goes first
        if sys.platform != "linux" or size > SMALL_PART * available_memory():
            return np.memmap(path, np.uint8, mode="r"), None
        room, file = aligned(size), path.open("rb")
    except (OSError, ValueError):
        return None
    return room, functools.partial(read_whole, file, room)


def read_whole(file: BinaryIO, room: NDArray[np.uint8]) -> None:
    """Fill `room` from a file and close it. Raises MachineError where that fails."""
    with file:
        try:
            if file.readinto(room.data) == room.size:  # type: ignore[attr-defined]
                return
            reason = "it ends too early"
        except OSError as error:
            reason = str(error)
    raise MachineError(f"{file.name} cannot be read: {reason}", hint="delete it: it is made anew")


def aligned(size: int) -> NDArray[np.uint8]:
    """Return memory that begins where a huge page can, not yet touched."""
    room = np.empty(size + HUGE_PAGE, np.uint8)
    return room[-room.ctypes.data % HUGE_PAGE :][:size]


def write(path: Path, program: Program, library: ctypes.CDLL, release: Callable[[], None]) -> None:
    """Write the packed weights of a program, whole or not at all, with those of one product in memory at a time."""
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        start = 0
        with os.fdopen(handle, "wb") as file:
            for step, end in products(program, library):
                room = aligned(end - start)
                pack(step, library, room)
                file.write(room.data)
                release()
                start = end
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
