"""A decoder with its KV cache: past and present of a layer are one buffer, bound once, written in place.

Graph inputs: input_ids, attention_mask int64 [1, …]; past_key_values.N.key/value fp32 [1, kv_heads, past, head_dim];
num_logits_to_keep int64 [] (optional); an adapter's A and B (optional, run/adapters.py).
Outputs: logits fp32 [1, positions, vocabulary]; present.N.key/value.
GroupQueryAttention takes the number of valid positions from attention_mask, so the buffers can be longer than what they
hold, and lowering `length` rewinds. Source: the operator specification of com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import FolderError, UserError
from edgelora.run.packed import open_packed
from edgelora.run.prefill import LEAST, PromptGraph
from edgelora.run.session import open_session

if TYPE_CHECKING:
    import onnxruntime as ort

Cache = dict[str, NDArray[np.float32]]

SELECTOR = "num_logits_to_keep"
FIRST_CAPACITY = 256  # positions; doubled when more are needed
CHUNK = 512  # positions computed at once: bounds the activations of a long prompt
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
        prompts: PromptGraph | None = None,
    ) -> None:
        """Open a decoder; `packed` keeps its weights in the user's cache as this machine's kernels read them.

        `prompts` is the graph that long prompts go through.
        """
        self.max_length, self.prompts = max_length, prompts
        self.length = 0  # valid positions in the cache
        self.initializers = dict(initializers or {})  # the session reads from their memory
        if packed and not self.initializers:  # what is put into a graph from outside is packed for this session alone
            self.session = open_packed(model, threads=threads)
        else:
            self.session = open_session(model, threads=threads, initializers=self.initializers)
        inputs = {value.name: value for value in self.session.get_inputs()}
        overridable = {value.name for value in self.session.get_overridable_initializers()}
        outputs = {value.name: value for value in self.session.get_outputs()}
        if missing := {"input_ids", "attention_mask"} - inputs.keys() | {"logits"} - outputs.keys():
            raise FolderError(f"{model} is not a decoder: it lacks {', '.join(sorted(missing))}")
        self.selects = SELECTOR in inputs or SELECTOR in overridable
        try:
            self.vocab_size = int(outputs["logits"].shape[-1])
            self.cache_shapes = {
                name: (int(value.shape[1]), int(value.shape[3]))
                for name, value in inputs.items()
                if name.startswith("past_key")
            }
        except (ValueError, TypeError, IndexError):
            raise FolderError(f"{model} is not a decoder: it leaves the size of its vocabulary or cache open") from None
        if not self.cache_shapes:
            raise FolderError(f"{model} is not a decoder: it has no cache of keys and values")
        self.cache: Cache = {}
        self.capacity = 0
        self._num_logits = np.zeros((), np.int64)
        self._ids = np.zeros((1, CHUNK), np.int64)
        self._mask = np.zeros((1, 0), np.int64)
        self._logits = np.empty((1, self.vocab_size), np.float32)
        self.set_factors({})

    def set_factors(self, factors: Mapping[str, ort.OrtValue]) -> None:
        """Let an adapter's A and B, by the graph's input names, act from now on; without any, the base alone.

        The cache is forgotten: its keys and values are another model's.
        """
        self.length = 0
        self.factors = dict(factors)  # bound by address
        self.binding = self.session.io_binding()  # what is bound once cannot be taken out alone
        self._bind_output("logits", self._logits, (1, 1, self.vocab_size))  # the first one bound is get_outputs()[0]
        if self.selects:
            self._bind_input(SELECTOR, self._num_logits, ())
        for name, value in self.factors.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, array in self.cache.items():
            self._bind_cache(name, array)

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens and return the logits `[vocabulary]` after the last of them.

        Raises UserError where the sequence would be longer than the model's limit.
        """
        assert len(ids), "nothing to run"
        self.reserve(self.length + len(ids))
        if self.prompts is not None and len(ids) > LEAST:
            self._fill(self.prompts, ids[:-1])  # the last token's logits are wanted
            ids = ids[-1:]
        step = CHUNK if self.selects else min(CHUNK, max(1, SCORED_FLOATS // self.vocab_size))
        rows = self._logits
        for start in range(0, len(ids), step):
            rows = self._run(ids[start : start + step], 1)
        return last(rows)

    def _fill(self, prompts: PromptGraph, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
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

    @property
    def score_limit(self) -> int:
        """Tokens that `score` takes at once, so that logits never grow beyond 16 MB."""
        return max(1, min(CHUNK, SCORED_FLOATS // self.vocab_size))

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        assert 0 <= length <= self.length, f"rewind to {length} of {self.length}"
        self.length = length

    def saved(self) -> Cache:
        """Return a copy of the keys and values so far, `[1, kv_heads, length, head_dim]` by input name."""
        return {name: array[:, :, : self.length].copy() for name, array in self.cache.items()}

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
        self._mask = np.ones((1, self.capacity), np.int64)
        for name, (heads, dim) in self.cache_shapes.items():
            # Pages that are not written yet cost no memory; buffers are replaced one at a time.
            grown = np.empty((1, heads, self.capacity, dim), np.float32)
            if name in self.cache:
                grown[:, :, : self.length] = self.cache[name][:, :, : self.length]
            self.cache[name] = grown
            self._bind_cache(name, grown)

    def _run(self, ids: Sequence[int], num_logits: int) -> NDArray[np.float32]:
        """Run `ids` at the end of the cache and return `[num_logits, vocabulary]` of the last positions."""
        count = len(ids)
        kept = num_logits if self.selects else count
        self._ids[0, :count] = ids
        self._num_logits[...] = kept
        self._bind_input("input_ids", self._ids, (1, count))
        self._bind_input("attention_mask", self._mask, (1, self.length + count))
        if kept == 1:
            self._bind_output("logits", self._logits, (1, 1, self.vocab_size))
        else:  # the declared shape is [1, 1, vocabulary]: memory of another size is refused, ONNX Runtime's own is not
            self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)
        self.length += count
        if kept == 1:
            return self._logits
        rows: NDArray[np.float32] = self.binding.get_outputs()[0].numpy()[0]
        return rows[kept - num_logits :]

    def _bind_cache(self, name: str, array: NDArray[np.float32]) -> None:
        self._bind_input(name, array, array.shape)
        self._bind_output(name.replace("past_key_values", "present"), array, array.shape)

    def _bind_input(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        """Bind the memory of `array`, or its beginning, by address: nothing is copied."""
        self.binding.bind_input(name, "cpu", 0, array.dtype.type, list(shape), array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        self.binding.bind_output(name, "cpu", 0, array.dtype.type, list(shape), array.ctypes.data)


def last(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    row: NDArray[np.float32] = rows[-1]
    return row
