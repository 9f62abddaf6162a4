"""A decoder with its KV cache, which grows while tokens come and rewinds: by kernels of our own, or ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import MachineError, UserError
from edgelora.run.bound import BoundDecoder, Cache
from edgelora.run.packed import native_file
from edgelora.run.prefill import LEAST, PromptGraph

if TYPE_CHECKING:
    import onnxruntime as ort

    from edgelora.native.library import NativeDecoder

FIRST_CAPACITY = 256  # positions; doubled when more are needed
SCORED_FLOATS = 4 << 20  # logits that `score` holds at once: 16 MB


class DecoderSession:
    """One sequence. Logits are views of a buffer that the next call overwrites."""

    def __init__(
        self,
        model: Path,
        *,
        max_length: int,
        threads: int | None = None,
        initializers: Mapping[str, ort.OrtValue] | None = None,
        packed: bool = False,
        native: bool = False,
        prompts: PromptGraph | None = None,
    ) -> None:
        """Open a decoder.

        `native` lets kernels of our own run it where there are some for its graph and this processor. In ONNX Runtime `packed`
        keeps its weights in the user's cache as this machine's kernels read them, and `prompts` is what long prompts take.
        """
        self.length = 0  # valid positions in the cache
        self.engine = (open_native(model, threads) if native and not initializers else None) or BoundDecoder(
            model, threads=threads, initializers=initializers, packed=packed
        )
        self.max_length = min(max_length, self.engine.positions)
        self.prompts = prompts if self.bound is not None else None
        self.vocab_size, self.cache_shapes = self.engine.vocab_size, self.engine.cache_shapes
        self.cache: Cache = {}
        self.capacity = 0

    @property
    def bound(self) -> BoundDecoder | None:
        """The session of ONNX Runtime, where that is what runs."""
        return self.engine if isinstance(self.engine, BoundDecoder) else None

    def read_ahead(self) -> None:
        """Begin to read what the first prompt needs, while something else is done."""
        if not isinstance(self.engine, BoundDecoder):
            self.engine.read_ahead()

    def set_factors(self, factors: Mapping[str, ort.OrtValue]) -> None:
        """Let an adapter's A and B, by the graph's input names, act from now on; without any, the base alone.

        The cache is forgotten: its keys and values are another model's.
        """
        self.length = 0
        if self.bound is not None:
            self.bound.set_factors(factors)
        else:
            assert not factors, "a graph with inputs for adapters is ONNX Runtime's"

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens and return the logits `[vocabulary]` after the last of them.

        Raises UserError where the sequence would be longer than the model's limit.
        """
        assert len(ids), "nothing to run"
        self.reserve(self.length + len(ids))
        if self.prompts is not None and len(ids) > LEAST:
            self._fill(self.prompts, ids[:-1])  # the last token's logits are wanted
            ids = ids[-1:]
        step = self.engine.chunk if self.engine.selects else self.score_limit
        for start in range(0, len(ids), step):
            rows = self._run(ids[start : start + step], 1)
        return last(rows)

    def _fill(self, prompts: PromptGraph, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), self.engine.chunk):
            part = ids[start : start + self.engine.chunk]
            prompts.fill(part, self.cache, self.length)
            self.length += len(part)

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token and return the logits `[vocabulary]` after it."""
        self.reserve(self.length + 1)
        return last(self._run((token,), 1))

    def score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens and return the logits `[len(ids), vocabulary]` after each; at most `score_limit` tokens."""
        assert 0 < len(ids) <= self.score_limit
        self.reserve(self.length + len(ids))
        return self._run(ids, len(ids))

    def _run(self, ids: Sequence[int], num_logits: int) -> NDArray[np.float32]:
        rows = self.engine.run(ids, self.length, num_logits)
        self.length += len(ids)
        return rows

    @property
    def score_limit(self) -> int:
        """Tokens that `score` takes at once, so that logits never grow beyond 16 MB."""
        return max(1, min(self.engine.chunk, SCORED_FLOATS // self.vocab_size))

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        assert 0 <= length <= self.length, f"rewind to {length} of {self.length}"
        self.length = length

    def saved(self) -> Cache:
        """Return a copy of the keys and values so far, `[1, kv_heads, length, head_dim]` by input name."""
        return {name: array[:, :, : self.length].astype(np.float32) for name, array in self.cache.items()}

    def restore(self, cache: Mapping[str, NDArray[np.float32]], length: int) -> None:
        """Let the first `length` positions of what `saved` returned be all that is cached."""
        self.length = 0  # nothing of the old need be kept when the buffers grow
        self.reserve(length)
        for name, array in self.cache.items():
            array[:, :, :length] = cache[name][:, :, :length]
        self.length = length

    def reserve(self, positions: int) -> None:
        """Make room for `positions` positions in all; what is cached stays."""
        if positions > self.max_length:
            raise UserError(
                f"the text has {positions} tokens; this bundle takes at most {self.max_length}",
                hint="shorten it",
            )
        if positions <= self.capacity:
            return
        capacity = max(FIRST_CAPACITY, self.capacity)
        while capacity < positions:
            capacity *= 2
        self.capacity = min(capacity, self.max_length)
        for name, (heads, dim) in self.cache_shapes.items():
            # Pages that are not written yet cost no memory; buffers are replaced one at a time.
            grown = np.empty((1, heads, self.capacity, dim), self.engine.cache_type)
            if name in self.cache:
                grown[:, :, : self.length] = self.cache[name][:, :, : self.length]
            self.cache[name] = grown
            self.engine.set_cache({name: grown})


def open_native(model: Path, threads: int | None) -> NativeDecoder | None:
    """Return the decoder of our own kernels, None where they cannot run this graph here."""
    from edgelora.hardware import physical_cores
    from edgelora.native.library import open_native

    try:
        return open_native(model, threads=threads or physical_cores(), place=native_file)
    except MemoryError:
        raise MachineError(f"not enough memory to load {model}", hint="close other programs") from None


def last(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    row: NDArray[np.float32] = rows[-1]
    return row
