"""decoder.c, called through ctypes: a decoder that runs tokens over a cache of keys and values."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.later import Later
from edgelora.native.onnx_file import BrokenGraphError, read_graph
from edgelora.native.operations import Operation, Program
from edgelora.native.packing import packed_bytes, use_packed
from edgelora.native.program import UnknownGraphError, program_of

MODULE = "edgelora.native.decoder"  # where the package's build puts the library
SWITCH = "EDGELORA_NATIVE"  # 0: ONNX Runtime for everything
CHUNK = 128  # tokens at once: what stands between operations is 4 MB for SmolLM2, and 256 are no faster


@cache
def library() -> ctypes.CDLL | None:
    """Return the library; None where it was not built, or has no kernels for this processor."""
    found = importlib.util.find_spec(MODULE)
    if found is None or found.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(found.origin)
        if not loaded.edgelora_supported():
            return None
    except (OSError, AttributeError):  # of another system, or empty: compiled for another processor
        return None
    loaded.edgelora_open.restype = ctypes.c_void_p
    loaded.edgelora_open.argtypes = [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int] * 4]
    loaded.edgelora_run.restype = None
    loaded.edgelora_run.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int] * 4, *[ctypes.c_void_p] * 2]
    loaded.edgelora_clock.restype = None
    loaded.edgelora_clock.argtypes = [ctypes.c_void_p] * 2
    loaded.edgelora_packed_bytes.restype = ctypes.c_size_t
    loaded.edgelora_packed_bytes.argtypes = [ctypes.c_int] * 4
    loaded.edgelora_pack.restype = None
    loaded.edgelora_pack.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int] * 4, ctypes.c_void_p]
    loaded.edgelora_close.restype = None
    loaded.edgelora_close.argtypes = [ctypes.c_void_p]
    return loaded


def reason() -> str | None:
    """Return why nothing can run here, None where it can."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    return None if library() is not None else "not built for this processor"


def reason_of(model: Path) -> str | None:
    """Return why a bundle's graph is left to ONNX Runtime here, None where it is not."""
    if (found := reason()) is not None:
        return found
    try:
        program_of(read_graph(model))
    except (BrokenGraphError, UnknownGraphError) as error:
        return str(error)
    return None


def open_native(model: Path, *, threads: int, place: Callable[[Path, int], Path | None] | None = None) -> NativeDecoder | None:
    """Return the decoder of a bundle's graph; None where ONNX Runtime has to run it.

    `place`, given the model and a size in bytes, names the file that packed weights are kept in; None keeps them in memory.
    """
    if reason() is not None:
        return None
    try:
        graph = read_graph(model)
        decoder = NativeDecoder(program_of(graph), threads, place and functools.partial(place, model), graph.release)
        graph.release()
        return decoder
    except (BrokenGraphError, UnknownGraphError):
        return None


class NativeDecoder:
    """Runs tokens. One call at a time; ctypes lets Python's other threads run meanwhile."""

    chunk = CHUNK
    selects = True  # how many positions get logits
    cache_type = np.float16

    def __init__(
        self,
        program: Program,
        threads: int,
        place: Callable[[int], Path | None] | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Pack the weights of a program, or take them from the file that `place` names for their size.

        Raises UnknownGraphError where they cannot be, MemoryError.
        """
        loaded = library()
        assert loaded is not None
        self.unread = use_packed(program, loaded, place and place(packed_bytes(program, loaded)), release)
        self.reading: Later[None] | None = None
        self.program, self.library = program, loaded
        self.vocab_size, self.cache_shapes = program.vocab_size, program.cache_shapes
        self.positions = program.positions
        steps = (Operation * len(program.operations))(*program.operations)
        widths, blocks = (np.array(numbers, np.int32) for numbers in (program.widths, program.blocks))
        self.handle = loaded.edgelora_open(
            steps, len(steps), widths.ctypes.data, blocks.ctypes.data, len(widths), threads, CHUNK, program.positions
        )
        if not self.handle:
            raise MemoryError
        self.pointers: Any = (ctypes.c_void_p * len(self.cache_shapes))()
        self.capacity = 0
        self._ids = np.zeros(CHUNK, np.int64)
        self._logits = np.empty((1, self.vocab_size), np.float32)
        weakref.finalize(self, loaded.edgelora_close, self.handle)

    def read_ahead(self) -> None:
        """Begin to read the weights, where they are read and not mapped, while something else is done."""
        if self.unread is not None:
            self.reading, self.unread = Later(self.unread), None

    def set_cache(self, cache: Mapping[str, NDArray[Any]]) -> None:
        """Let keys and values be read and written in these arrays `[1, kv_heads, capacity, head_dim]`, all of one capacity."""
        for place, name in enumerate(self.cache_shapes):
            if name in cache:
                self.pointers[place], self.capacity = cache[name].ctypes.data, cache[name].shape[2]

    def clock(self) -> NDArray[np.float64]:
        """Return seconds that each operation has taken since: the calls that follow add to them."""
        self._seconds = np.zeros(len(self.program.operations))
        self.library.edgelora_clock(self.handle, self._seconds.ctypes.data)
        return self._seconds

    def run(self, ids: Sequence[int], past: int, num_logits: int) -> NDArray[np.float32]:
        """Run `ids` after `past` positions and return `[num_logits, vocabulary]` of the last of them, until the next call.

        Raises ValueError where an id is not of the vocabulary.
        """
        self.read_ahead()
        if self.reading is not None:
            self.reading.result()
            self.reading = None
        count = len(ids)
        self._ids[:count] = ids
        least, most = int(self._ids[:count].min()), int(self._ids[:count].max())
        if least < 0 or most >= self.program.rows:
            raise ValueError(f"token ids go from {least} to {most}; the model has {self.program.rows}")
        assert 0 < num_logits <= count <= CHUNK
        assert past + count <= min(self.capacity, self.program.positions)
        if len(self._logits) < num_logits:
            self._logits = np.empty((num_logits, self.vocab_size), np.float32)
        self.library.edgelora_run(
            self.handle, self._ids.ctypes.data, count, past, num_logits, self.capacity, self.pointers, self._logits.ctypes.data
        )
        return self._logits[:num_logits]
