"""Safetensors files read one tensor at a time, each through its own memory map that goes away with the tensor.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgelora.errors import FolderError, ModelError
from edgelora.folder import inside_or_cached

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `offset` counts from the start of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def map_bytes(path: Path, offset: int, num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a private mapping of a piece of a file, uint8 `[num_bytes]`; its pages are given back with the array."""
    if num_bytes == 0:
        return np.empty(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=(num_bytes,))


def read_entry(entry: Entry) -> Tensor:
    """Return the tensor as stored, without a copy where its place in the file is aligned."""
    data = torch.from_numpy(map_bytes(entry.path, entry.offset, entry.num_bytes))
    if entry.offset % entry.dtype.itemsize:
        data = data.clone()
    return data.view(entry.dtype).view(entry.shape)


def read_entry_rows(entry: Entry, start: int, stop: int) -> Tensor:
    """Return the rows `[start:stop]` of a tensor; no other page of it is mapped."""
    row = entry.num_bytes // entry.shape[0]
    shape = (stop - start, *entry.shape[1:])
    return read_entry(
        dataclasses.replace(entry, shape=shape, offset=entry.offset + start * row, num_bytes=(stop - start) * row)
    )


def folder_entries(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a Hugging Face folder: model.safetensors, or the shards that an index names.

    Raises ModelError that lists every damaged or missing file.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return file_entries(folder / "model.safetensors")
    try:
        wanted = {str(name): str(file) for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        files = [inside_or_cached(folder, file) for file in sorted(set(wanted.values()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is damaged", hint="download the model again") from None
    except FolderError as error:
        raise ModelError(f"{index}: {error.message}") from None
    entries: dict[str, Entry] = {}
    problems = []
    for file in files:
        try:
            entries |= file_entries(file)
        except ModelError as error:
            problems.append(error.message)
    if not problems:
        problems = [f"{name}: named in the index, in no shard" for name in wanted if name not in entries]
    if problems:
        raise ModelError("\n  ".join([f"{folder} is damaged:", *problems[:20]]), hint="download the model again")
    return entries


def file_entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of one safetensors file, checked: header, types, offsets inside the file, sizes that fit shapes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ModelError(f"{path} is not a safetensors file, or is cut short ({size} bytes)", hint=_AGAIN)
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing", hint=_AGAIN) from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} has a damaged header", hint=_AGAIN) from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} has a damaged header", hint=_AGAIN)
    entries, problems = {}, []
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        entry = _entry(path, fields, 8 + length)
        if isinstance(entry, str):
            problems.append(f"{name}: {entry}")
        elif entry.offset + entry.num_bytes > size:
            problems.append(f"{name}: ends at byte {entry.offset + entry.num_bytes} of a file of {size}")
        else:
            entries[name] = entry
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ModelError("\n  ".join([f"{path} is damaged or cut short:", *problems[:10], *more]), hint=_AGAIN)
    return entries


_AGAIN = "download the model again"


def _entry(path: Path, fields: Any, base: int) -> Entry | str:
    try:
        dtype, shape, (start, stop) = DTYPES[fields["dtype"]], tuple(fields["shape"]), fields["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            return "sizes are not whole numbers"
    except (KeyError, TypeError, ValueError):
        return f"cannot be read as {fields!r:.80}"
    if stop - start != math.prod(shape) * dtype.itemsize:
        return f"{stop - start} bytes do not hold {list(shape)} of {fields['dtype']}"
    return Entry(path, dtype, shape, base + start, stop - start)
