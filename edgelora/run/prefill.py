"""Long prompts through a graph of their own, which fills the decoder's cache with products in 8 bits (export/prefill.py).

It is opened when the first prompt comes that is long enough, since it takes memory of its own: about a byte for each weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import FolderError
from edgelora.folder import inside
from edgelora.run.packed import open_packed
from edgelora.run.session import open_session

if TYPE_CHECKING:
    import onnxruntime as ort

    from edgelora.bundle import Bundle

LEAST = 32  # tokens: fewer take the decoder's own graph less time than the difference


class PromptGraph:
    """Opens `path` when it is first used. Graph inputs: input_ids, attention_mask int64 [1, …], past_key_values.*."""

    def __init__(self, path: Path, threads: int | None = None, *, keep: bool = True) -> None:
        """`keep` its weights in the user's cache as this machine's kernels read them."""
        self.path, self.threads, self.keep = path, threads, keep

    @cached_property
    def session(self) -> ort.InferenceSession:
        return (open_packed if self.keep else open_session)(self.path, threads=self.threads)

    def fill(self, ids: Sequence[int], cache: Mapping[str, NDArray[np.float32]], length: int) -> None:
        """Write the keys and values of tokens after the first `length` positions of a decoder's buffers, in place."""
        tokens, mask = np.array([ids], np.int64), np.ones((1, length + len(ids)), np.int64)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("attention_mask", mask)
        for name, array in cache.items():
            binding.bind_input(name, "cpu", 0, np.float32, list(array.shape), array.ctypes.data)
            present = name.replace("past_key_values", "present")
            binding.bind_output(present, "cpu", 0, np.float32, list(array.shape), array.ctypes.data)
        self.session.run_with_iobinding(binding)


def shipped(bundle: Bundle, threads: int | None = None) -> PromptGraph | None:
    """Return the prompt graph that a bundle ships, if it does. Raises FolderError where the manifest's entry is damaged."""
    entry = bundle.manifest.get("prefill")
    if entry is None:
        return None
    try:
        path = inside(bundle.folder, entry["file"])
    except (KeyError, TypeError) as error:
        hint = f"edgelora export RUN -o {bundle.folder} --fast-prompts --overwrite"
        raise FolderError(f"{bundle.folder} is damaged: the entry of its prompt graph ({error})", hint=hint) from None
    return PromptGraph(path, threads)
