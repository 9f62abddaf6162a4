"""Block scales learned beside an adapter, apart from any model: block_scales.safetensors in a run folder.

What ships is e·s·q, with codes q and scales s of W0 + s·BA, and e what each scale was multiplied by. Without rounding that is
(W0 + s·BA) with each block times e: the adapter in fp32 is not A and B alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from edgelora.errors import FolderError

FILE = "block_scales.safetensors"


@dataclass(frozen=True)
class LearnedScales:
    """log e `[N, ceil(K / block_size)]` by path."""

    logs: Mapping[str, Tensor] = field(default_factory=dict)
    block_size: int = 32

    def times(self, path: str, weight_NK: Tensor) -> Tensor:
        """Return the weight of a layer, fp32 and not used elsewhere, with each block multiplied by what was learned."""
        return times(weight_NK, self.logs[path], self.block_size) if path in self.logs else weight_NK

    def save(self, folder: Path) -> None:
        """Replace the file of a run folder atomically."""
        from safetensors.torch import save_file

        tensors = {path: logs.detach().contiguous() for path, logs in self.logs.items()}
        save_file(tensors, folder / f".{FILE}.partial", metadata={"block_size": str(self.block_size)})
        (folder / f".{FILE}.partial").replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> LearnedScales:
        """Return those of a folder; nothing where it has none. Raises FolderError for a damaged file."""
        from safetensors import SafetensorError, safe_open

        path = folder / FILE
        if not path.is_file():
            return cls()
        try:
            with safe_open(path, "pt") as file:
                return cls({name: file.get_tensor(name) for name in file.keys()}, int((file.metadata() or {})["block_size"]))  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise FolderError(f"{path} is damaged: {error}", hint="train again with --overwrite") from None


def times(weight_NK: Tensor, logs: Tensor, block_size: int) -> Tensor:
    """Multiply each block of a weight by exp(logs) in place, some rows at a time; return it."""
    num_outputs, num_inputs = weight_NK.shape
    expected = (num_outputs, -(-num_inputs // block_size))
    if tuple(logs.shape) != expected:
        raise FolderError(f"learned scales of shape {list(logs.shape)} are not those of a weight {list(weight_NK.shape)}")
    step = max(1, (1 << 20) // num_inputs)
    for start in range(0, num_outputs, step):
        rows = slice(start, start + step)
        factors = torch.exp(logs[rows]).repeat_interleave(block_size, 1)[:, :num_inputs]
        weight_NK[rows].mul_(factors)
    return weight_NK
