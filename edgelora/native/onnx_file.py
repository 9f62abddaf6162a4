"""The nodes and weights of an .onnx file, read without the onnx package, which a device does not have.

Source: onnx.proto3 (ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto) and protobuf's wire format: a key is
field number × 8 + type; types are 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.folder import inside

TYPES: dict[int, type[np.generic]] = {1: np.float32, 2: np.uint8, 6: np.int32, 7: np.int64}  # TensorProto.DataType
EXTERNAL = 1  # TensorProto.DataLocation


class BrokenGraphError(Exception):
    """The file is not what it should be; ONNX Runtime will say so in its own words."""


@dataclass(frozen=True)
class Node:
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int | float | None]  # None: of another type


@dataclass(frozen=True)
class Graph:
    producer: str
    nodes: list[Node]
    tensors: dict[str, NDArray[Any]]  # initializers; those beside the graph are mapped, not read
    files: list[NDArray[np.uint8]] = field(default_factory=list)  # that are mapped

    def release(self) -> None:
        """Give back the memory of what was read so far: a page of a file that is touched may bring 2 MB of it along."""
        for file in self.files:
            if hasattr(mmap, "MADV_DONTNEED"):
                file._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # what is wanted again is read again


def read_graph(path: Path) -> Graph:
    """Read an .onnx file. Raises BrokenGraphError where it or the file of its weights is damaged."""
    try:
        model = path.read_bytes()
        producer, graph = "", b""
        for number, value in fields(memoryview(model)):
            if number == 2:
                producer = text(value)
            elif number == 7:
                graph = value
        files = Files(path)
        nodes, tensors = contents(graph, files)
        return Graph(producer, nodes, tensors, list(files.mapped.values()))
    except (IndexError, TypeError, ValueError, OSError, struct.error, KeyError) as error:
        raise BrokenGraphError(str(error)) from None


def contents(graph: Any, files: Files) -> tuple[list[Node], dict[str, NDArray[Any]]]:
    nodes, tensors = [], {}
    for number, value in fields(graph):
        if number == 1:
            nodes.append(node(bytes(value)))
        elif number == 5:
            name, array = tensor(bytes(value), files)
            tensors[name] = array
    return nodes, tensors


class Files:
    """The files beside a graph, each mapped once."""

    def __init__(self, graph: Path) -> None:
        self.folder = graph.parent
        self.mapped: dict[str, NDArray[np.uint8]] = {}

    def part(self, location: str, offset: int, length: int) -> NDArray[np.uint8]:
        if location not in self.mapped:
            self.mapped[location] = np.memmap(inside(self.folder, location), np.uint8, mode="r")
        found = self.mapped[location][offset : offset + length]
        if offset < 0 or len(found) != length:
            raise ValueError(f"{location} is too short")
        return found


def node(data: Any) -> Node:
    inputs, outputs, operator, attributes = [], [], "", {}
    for number, value in fields(data):
        if number == 1:
            inputs.append(text(value))
        elif number == 2:
            outputs.append(text(value))
        elif number == 4:
            operator = text(value)
        elif number == 5:
            name, found = attribute(value)
            attributes[name] = found
    return Node(operator, tuple(inputs), tuple(outputs), attributes)


def attribute(data: Any) -> tuple[str, int | float | None]:
    name, found = "", None
    for number, value in fields(data):
        if number == 1:
            name = text(value)
        elif number == 2:
            found = struct.unpack("<f", value)[0]
        elif number == 3:
            found = value - (1 << 64) if value >> 63 else value
    return name, found


def tensor(data: Any, files: Files) -> tuple[str, NDArray[Any]]:
    shape: list[int] = []
    name, kind, location, outside = "", 0, 0, {}
    raw: Any = b""
    for number, value in fields(data):
        if number == 1:
            shape += [value] if isinstance(value, int) else packed(value)
        elif number == 2:
            kind = value
        elif number == 8:
            name = text(value)
        elif number == 9:
            raw = value
        elif number == 13:
            pair = {key: text(content) for key, content in fields(value)}
            outside[pair[1]] = pair[2]
        elif number == 14:
            location = value
    if kind not in TYPES:
        return name, np.zeros(0)  # of a type that nothing here takes
    size = np.dtype(TYPES[kind]).itemsize * int(np.prod(shape, dtype=np.int64))
    if location == EXTERNAL:
        raw = files.part(outside["location"], int(outside.get("offset", 0)), int(outside.get("length", size)))
    else:
        raw = np.frombuffer(raw, np.uint8).copy()  # to where numbers may begin
    return name, np.frombuffer(raw, TYPES[kind]).reshape(shape)


def packed(data: Any) -> list[int]:
    numbers, at = [], 0
    while at < len(data):
        value, at = varint(data, at)
        numbers.append(value)
    return numbers


def fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a message: numbers of varints, memory of everything else."""
    at, end = 0, len(data)
    while at < end:
        key, at = varint(data, at) if data[at] > 127 else (data[at], at + 1)  # most numbers are of one byte
        kind = key & 7
        if kind == 0:
            value, at = varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = varint(data, at) if data[at] > 127 else (data[at], at + 1)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > end:
            raise ValueError("a field is cut off")
        yield key >> 3, data[at : at + length]
        at += length


def varint(data: Any, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def text(data: Any) -> str:
    return bytes(data).decode("utf-8")
