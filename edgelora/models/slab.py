"""Memory for what is kept from forward to backward: pieces of a few large chunks, handed out one after the other.

Kept tensors live long and lie between short-lived ones; in the C heap they would leave holes that the next layer's tensors do
not fit into (SmolLM2 with everything kept in bf16: 1.4 times what was in use, after three steps). A chunk is a mapping of its
own: what is not written to takes no memory, and when backward is done the next forward pass starts at its beginning again.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64 << 20  # bytes; above the largest size that the C library takes from its heap
ALIGNMENT = 64  # bytes, a cache line

_free: list[Tensor] = []


class Slab:
    """The kept tensors of one forward pass. Its chunks are free again when nothing refers to it any more."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._used = CHUNK

    def put(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of x in another type, contiguous, that is valid as long as the slab."""
        size = x.numel() * dtype.itemsize
        if size > CHUNK:
            return x.to(dtype, copy=True)
        if self._used + size > CHUNK:
            # The first one first: what is at the end of the last has never been written to.
            self._chunks.append(_free.pop(0) if _free else torch.empty(CHUNK, dtype=torch.uint8))
            self._used = 0
        place = self._chunks[-1][self._used : self._used + size].view(dtype).view(x.shape)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return place.copy_(x)

    def __del__(self) -> None:
        _free.extend(self._chunks)


def release() -> None:
    """Give the memory of free chunks back: there will be no backward for a while."""
    _free.clear()
