"""A decoder's graph in ONNX Runtime with its memory bound: past and present of a layer are one buffer, written in place.

Graph inputs: input_ids, attention_mask int64 [1, …]; past_key_values.N.key/value fp32 [1, kv_heads, past, head_dim];
num_logits_to_keep int64 [] (optional); an adapter's A and B (optional, run/adapters.py).
Outputs: logits fp32 [1, positions, vocabulary]; present.N.key/value.
GroupQueryAttention takes the number of valid positions from attention_mask, so the buffers can be longer than what they hold.
Source: the operator specification of com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import FolderError
from edgelora.run.packed import open_packed
from edgelora.run.session import open_session

if TYPE_CHECKING:
    import onnxruntime as ort

SELECTOR = "num_logits_to_keep"
CHUNK = 512  # positions computed at once: bounds the activations of a long prompt
Cache = dict[str, NDArray[Any]]  # keys and values [1, kv_heads, positions, head_dim] by the graph's input; fp32 where kept


class BoundDecoder:
    """Runs tokens; `run` returns logits that the next call overwrites."""

    chunk = CHUNK
    cache_type = np.float32
    positions = sys.maxsize  # that it can tell apart; ONNX Runtime says itself where a table ends

    def __init__(
        self, model: Path, *, threads: int | None, initializers: Mapping[str, ort.OrtValue] | None = None, packed: bool = False
    ) -> None:
        """Open a graph; `packed` keeps its weights in the user's cache as this machine's kernels read them."""
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
        self._num_logits = np.zeros((), np.int64)
        self._ids = np.zeros((1, CHUNK), np.int64)
        self._mask = np.zeros((1, 0), np.int64)
        self._logits = np.empty((1, self.vocab_size), np.float32)
        self.set_factors({})

    def set_factors(self, factors: Mapping[str, ort.OrtValue]) -> None:
        """Let an adapter's A and B, by the graph's input names, act from now on; without any, the base alone."""
        self.factors = dict(factors)  # bound by address
        self.binding = self.session.io_binding()  # what is bound once cannot be taken out alone
        self._bind_output("logits", self._logits, (1, 1, self.vocab_size))  # the first one bound is get_outputs()[0]
        if self.selects:
            self._bind_input(SELECTOR, self._num_logits, ())
        for name, value in self.factors.items():
            self.binding.bind_ortvalue_input(name, value)
        self.set_cache(self.cache)

    def set_cache(self, cache: Cache) -> None:
        """Let keys and values be read and written in these arrays `[1, kv_heads, capacity, head_dim]`."""
        self.cache |= cache
        for name, array in cache.items():
            self._bind_input(name, array, array.shape)
            self._bind_output(name.replace("past_key_values", "present"), array, array.shape)

    def run(self, ids: Sequence[int], past: int, num_logits: int) -> NDArray[np.float32]:
        """Run `ids` after `past` positions and return `[num_logits, vocabulary]` of the last of them."""
        count = len(ids)
        kept = num_logits if self.selects else count
        if self._mask.shape[1] < past + count:
            self._mask = np.ones((1, max(past + count, 2 * self._mask.shape[1])), np.int64)
        self._ids[0, :count] = ids
        self._num_logits[...] = kept
        self._bind_input("input_ids", self._ids, (1, count))
        self._bind_input("attention_mask", self._mask, (1, past + count))
        if kept == 1:
            self._bind_output("logits", self._logits, (1, 1, self.vocab_size))
        else:  # the declared shape is [1, 1, vocabulary]: memory of another size is refused, ONNX Runtime's own is not
            self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)
        if kept == 1:
            return self._logits
        rows: NDArray[np.float32] = self.binding.get_outputs()[0].numpy()[0]
        return rows[kept - num_logits :]

    def _bind_input(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        """Bind the memory of `array`, or its beginning, by address: nothing is copied."""
        self.binding.bind_input(name, "cpu", 0, array.dtype.type, list(shape), array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        self.binding.bind_output(name, "cpu", 0, array.dtype.type, list(shape), array.ctypes.data)
