"""Small safetensors files, written and read with numpy alone: a device has no torch and no safetensors.

    8 bytes: the header's length
    the header, JSON: {name: {dtype, shape, data_offsets}, "__metadata__": {text: text}}; then the tensors

Source: the format of the safetensors library. Whoever reads says which tensors a file must have.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.folder import disk_errors

MAX_HEADER = 100_000_000  # the limit of the safetensors library
TYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype(np.uint16), "F32": np.dtype(np.float32)}

Array = NDArray[np.float32]


def write_tensors(
    path: Path, stored: Mapping[str, tuple[str, NDArray[Any]]], facts: Mapping[str, str], *, private: bool = False
) -> None:
    """Write (dtype, array) by name, and the metadata `facts`, atomically; bf16 comes as uint16. F32 must stand before BF16.

    `private`: nobody but the user may read the file, nor while it is written.
    """
    header: dict[str, Any] = {"__metadata__": dict(facts)}
    end = 0
    for name, (kind, array) in stored.items():  # fp32 first, so that each begins at a multiple of its element's size
        start, end = end, end + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # another process may write it too
    with disk_errors(path):
        try:
            partial.touch(mode=0o600 if private else 0o666)
            with partial.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for kind, array in stored.values():
                    file.write(np.ascontiguousarray(array, TYPES[kind]).reshape(-1).data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """Return the header and where the tensors begin. Raises ValueError."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER):
        raise ValueError(f"it is cut short ({len(data)} bytes), or no safetensors file")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header, 8 + length


def read_array(data: bytes, base: int, entry: Mapping[str, Any]) -> Array:
    """Return one tensor in fp32: of F32 a view of `data`, not to be written to. Raises ValueError, KeyError or TypeError."""
    kind, shape, (start, stop) = TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or base + stop > len(data):
        raise ValueError(f"a tensor of shape {list(shape)} lies outside of the file")
    if stop - start != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{stop - start} bytes do not hold {list(shape)} of {entry['dtype']}")
    stored = np.frombuffer(data, kind, math.prod(shape), base + start).reshape(shape)
    if kind == np.uint16:
        return np.left_shift(stored.astype(np.uint32), 16, dtype=np.uint32).view(np.float32)
    return stored
