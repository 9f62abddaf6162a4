"""Where each frozen tensor lies in the base file (`models/base_file.py`), and how the tensors of a source are written there.

The data are sections in the order in which they are computed: embedding, blocks, final norm and head. A section starts at a
multiple of ALIGN, so that it can be fetched and dropped by itself. In it come the groups, layers on the same input: the codes
of all members, one after the other, then their scales (at 16 and 32 bits: their values), so that a group is one matrix
`[N_1 + N_2 + …, K]` too; then the tables; then the small tensors in fp32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from edgelora.models.source import ModelSource
from edgelora.quant.grid import QuantizedTensor, quantize

ALIGN = 1 << 16  # the largest page in use: 4 KB on x86, 16 KB on Apple's, up to 64 KB on ARM
LINE = 64  # a cache line
PART = 1 << 22  # weights quantized at once: 16 MB of fp32
FORMS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Write = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Section:
    """What is computed at once.

    groups: module paths of linear layers, those on the same input together; tables: embeddings and LM heads, which keep at
    least 8 bits; plain: names of small tensors; block: whether it is one of the repeated blocks; transposed: whether the
    file of the model holds the linear layers' weights as `[K, N]`; bits: of the layers that have their own
    """

    groups: tuple[tuple[str, ...], ...] = ()
    tables: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    block: bool = False
    transposed: bool = False
    bits: dict[str, int] = field(default_factory=dict)


def own_bits(sections: Sequence[Section], bits: Mapping[str, int]) -> list[Section]:
    """Return the sections with the bits of the layers that have their own, by path."""
    own = [{path: bits[path] for (path,) in section.groups if path in bits} for section in sections]
    return [dataclasses.replace(section, bits=found) for section, found in zip(sections, own, strict=True)]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `offset` of its codes or values and `scales` of its scales, in bytes from the start of the data."""

    form: str  # "grid" or one of FORMS
    shape: tuple[int, ...]
    offset: int = 0
    scales: int = 0
    bits: int = 0
    block_size: int = 0

    @property
    def num_blocks(self) -> int:
        return -(-self.shape[1] // self.block_size)

    @property
    def row_bytes(self) -> int:
        """The bytes of a row's codes or values."""
        if self.form == "grid":
            return self.num_blocks * self.block_size * self.bits // 8
        return math.prod(self.shape[1:]) * FORMS[self.form].itemsize

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def take(self, data: Tensor) -> Tensor | QuantizedTensor:
        """Return the tensor as views of `data`, uint8."""
        stored = data[self.offset : self.offset + self.num_bytes]
        if self.form != "grid":
            return stored.view(FORMS[self.form]).view(self.shape)
        scales = data[self.scales : self.scales + 4 * self.shape[0] * self.num_blocks].view(torch.float32)
        rows, blocks = self.shape[0], self.num_blocks
        return QuantizedTensor(
            stored.view(rows, blocks, -1), scales.view(rows, blocks), self.bits, self.block_size, self.shape[1]
        )


@dataclass(frozen=True)
class Layout:
    """places: module path of a matrix, or name of a small tensor → its place; sections: [start, stop) of each in bytes."""

    places: dict[str, Place]
    sections: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return self.sections[-1][1]


def lay_out(source: ModelSource, sections: Sequence[Section], bits: int, block_size: int) -> Layout:
    """Give every tensor its place."""
    places: dict[str, Place] = {}
    ends = []
    end = 0
    for section in sections:
        start = end = up_to(end, ALIGN)
        own = section.bits
        groups = [
            {path: _form(source, path, own.get(path, bits), block_size, section.transposed) for path in group}
            for group in section.groups
        ]
        groups += [{path: _form(source, path, max(bits, 8), block_size, False)} for path in section.tables]
        for group in groups:
            # Layers of other bits, as a merge may choose them, are no neighbours.
            for _, alike in groupby(group.items(), key=lambda item: (item[1].form, item[1].bits, item[1].block_size)):
                placed, end = _place(dict(alike), end)
                places |= placed
        for name in section.plain:
            placed, end = _place({name: Place("fp32", source.shape(name))}, end)
            places |= placed
        ends.append((start, end))
    return Layout(places, tuple(ends))


def up_to(size: int, multiple: int) -> int:
    """Return the least multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def _place(group: dict[str, Place], end: int) -> tuple[dict[str, Place], int]:
    """Put tensors of one form one after the other, then their scales; return them and the new end."""
    offset = up_to(end, LINE)
    scales = up_to(offset + sum(place.num_bytes for place in group.values()), LINE)
    placed = {}
    for name, place in group.items():
        on_grid = place.form == "grid"
        placed[name] = Place(place.form, place.shape, offset, scales if on_grid else 0, place.bits, place.block_size)
        offset += place.num_bytes
        scales += 4 * place.shape[0] * place.num_blocks if on_grid else 0
    return placed, scales


def _form(source: ModelSource, path: str, bits: int, block_size: int, transposed: bool) -> Place:
    """Return the form that a matrix will have; what is on the grid already stays as it is."""
    shape = source.shape(f"{path}.weight")
    if source.merged is not None and path in source.merged.layers:
        layer = source.merged.layers[path]
        return Place("grid", shape, bits=layer["bits"], block_size=layer["block_size"])
    shape = shape[::-1] if transposed and source.merged is None else shape
    if bits < 16:
        return Place("grid", shape, bits=bits, block_size=block_size)
    form = "fp16" if bits == 16 and stored_dtype(source, path) == torch.float16 else {16: "bf16", 32: "fp32"}[bits]
    return Place(form, shape)


def stored_dtype(source: ModelSource, path: str) -> torch.dtype:
    """Return the type in which the weight of a layer is read."""
    return next(source.read_in_parts(f"{path}.weight", 1)).dtype


def fill(source: ModelSource, sections: Sequence[Section], layout: Layout, write: Write) -> Iterator[None]:
    """Write every tensor to its place, one at a time and a large one in parts; yields after each section."""
    for section in sections:
        for path in (path for group in section.groups for path in group):
            _write_matrix(_parts(source, path, section.transposed), layout.places[path], write)
        for path in section.tables:
            _write_matrix(_parts(source, path, False), layout.places[path], write)
        for name in section.plain:
            write(layout.places[name].offset, source.read(name).float())
        yield


def _parts(source: ModelSource, path: str, transposed: bool) -> Iterator[Tensor | QuantizedTensor]:
    if transposed or source.merged is not None:
        yield source.read_linear(path, transposed=transposed)
    else:
        name = f"{path}.weight"
        yield from source.read_in_parts(name, max(1, PART // source.shape(name)[1]))


def _write_matrix(parts: Iterator[Tensor | QuantizedTensor], place: Place, write: Write) -> None:
    start = 0
    for part in parts:
        if place.form == "grid":
            codes = part if isinstance(part, QuantizedTensor) else quantize(part, place.bits, place.block_size)
            write(place.offset + start * place.row_bytes, codes.codes)
            write(place.scales + start * place.num_blocks * 4, codes.scales)
        else:
            assert isinstance(part, Tensor)
            write(place.offset + start * place.row_bytes, part.to(FORMS[place.form]))
        start += part.shape[0]
