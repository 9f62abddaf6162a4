"""A digest of each layer's codes and scales, which goes along from the last training step to the ONNX file.

A run's manifest holds those of the layers that training computed with (`grid.digests`), a merged folder's those of all its
layers (`digests`) and the paths of those that training computed with (`as_trained`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import ModelError
from edgelora.quant.grid import QuantizedTensor

Array = NDArray[Any]
SHOWN = 10  # layers named in a message


def digest(tensor: QuantizedTensor) -> str:
    """Return the sha256 of a layer on the grid: "bits block_size K", codes and scales."""
    return digest_arrays(
        tensor.codes.numpy(), tensor.scales.detach().numpy(), tensor.bits, tensor.block_size, tensor.num_inputs
    )


def digest_arrays(codes: Array, scales: Array, bits: int, block_size: int, num_inputs: int) -> str:
    """Return the same of the rows of an ONNX file: codes uint8 `[N, blocks, bytes]`, scales fp32 `[N, blocks]`."""
    found = hashlib.sha256(f"{bits} {block_size} {num_inputs}\n".encode())
    found.update(np.ascontiguousarray(codes).data)
    found.update(np.ascontiguousarray(scales).astype("<f4", copy=False).data)
    return found.hexdigest()


def different(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Return the paths of `wanted` that `found` has another digest for, or none."""
    return [path for path, value in wanted.items() if found.get(path) != value]


def refuse_different(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise ModelError naming the layers whose merged codes and scales are not those of the last training step."""
    bad = different(found, wanted)
    if bad:
        raise ModelError(
            "\n  ".join(["these layers are not what training computed with, in codes or scales:", *shortened(bad)]),
            hint="the run, its scales or its base model have changed since: train again, or merge where it was trained",
        )


def shortened(paths: list[str]) -> list[str]:
    return [*paths[:SHOWN], *([f"and {len(paths) - SHOWN} more"] if len(paths) > SHOWN else [])]
