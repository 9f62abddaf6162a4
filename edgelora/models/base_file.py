"""The frozen weights of a model as one mapped file in the user's cache: quantized once, loaded at once ever after.

    8 bytes MAGIC, 32 bytes sha256 of the header, 8 bytes its length, the header (JSON), zeros up to a multiple of ALIGN,
    then the data as `models/base_layout.py` lays them out

A file is written to a temporary sibling and renamed when complete; one that does not hold what its header says is made again.
Its name tells the model, the bits, the block size and the layout. All files together stay below EDGELORA_BASE_CACHE_GB
(default 20; a single larger file may exist alone): the least recently used go first. The folder is EDGELORA_BASE_CACHE, or
`base` in the user's cache; it may be deleted at any time (a running process keeps the file that it has mapped).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgelora import console
from edgelora.errors import FolderError, MachineError, SettingsError
from edgelora.folder import disk_errors
from edgelora.models.base_layout import ALIGN, Layout, Place, Section, fill, lay_out, stored_dtype, up_to
from edgelora.models.source import ModelSource
from edgelora.models.stream import Stream
from edgelora.quant.grid import QuantizedTensor

VERSION = 1  # raise it when the layout or the rounding of quant/grid.py changes: old files are then not used any more
MAGIC = b"EdgeLoRA"
HEAD = len(MAGIC) + 32 + 8
MAX_HEADER = 1 << 28
SUFFIX, PARTIAL = ".base", ".partial"
CACHE_GB = 20.0
SYNC_BYTES = 64 << 20  # written pages cannot be taken back before they are on disk: not more than this many wait
ABANDONED_SECONDS = 3600.0


class BaseWeights:
    """Frozen weights laid out one after the other, in a mapped file or in memory; read like a ModelSource.

    What the layout does not have (a classifier's head) is read from `source`.
    """

    def __init__(
        self, source: ModelSource, layout: Layout, data: Tensor, mapping: mmap.mmap | None = None, start: int = 0,
        path: Path | None = None,
    ) -> None:  # fmt: skip
        self.source, self.layout = source, layout
        self._data = data
        self._mapping, self._start, self._path = mapping, start, path

    @property
    def mapped(self) -> bool:
        return self._mapping is not None

    @property
    def reference(self) -> str:
        return self.source.reference

    def names(self) -> list[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def read(self, name: str) -> Tensor:
        """Return a small tensor by name, fp32 in memory of its own."""
        place = self.layout.places.get(name)
        if place is None:
            return self.source.read(name)
        tensor = place.take(self._data)
        assert isinstance(tensor, Tensor)
        return tensor.clone()

    def read_linear(self, path: str, *, transposed: bool = False) -> Tensor | QuantizedTensor:
        """Return the weight `[N, K]` of a layer as a view; views of one group lie one after the other."""
        place = self.layout.places.get(path)
        return place.take(self._data) if place is not None else self.source.read_linear(path, transposed=transposed)

    def stream(self, sections: Sequence[Section]) -> Stream | None:
        """Return the stream through the blocks; None for weights that lie in memory."""
        if self._mapping is None:
            return None
        bounds = [(start + self._start, stop + self._start) for start, stop in self.layout.sections]
        blocks = [part for part, section in zip(bounds, sections, strict=True) if section.block]
        tables = [part for part, section in zip(bounds, sections, strict=True) if not section.block]
        return Stream(self._mapping, blocks, tables, self._path)


def open_base(
    source: ModelSource, sections: Sequence[Section], bits: int, block_size: int, *, streamed: bool = False
) -> ModelSource | BaseWeights:
    """Return the frozen weights in `bits` (32, 16, 8, 4), mapped from a file where that takes fewer bytes of memory.

    The source itself: where its files hold the weights in these bits already (nothing is copied), and for a merged folder that
    is not streamed.
    A file: for fewer bits than the source has; always if `streamed`. Memory: for more bits than the source has, and with a
    warning where the cache cannot be written. Raises MachineError if the disk is full.
    """
    if (source.merged is not None and not streamed) or not any(section.groups or section.tables for section in sections):
        return source
    path = cache_folder() / f"{_key(source, sections, bits, block_size)}-{VERSION}{SUFFIX}"
    found = _open(path, source)
    if found is not None:
        return found
    home = "file" if streamed else _home(source, sections, bits)
    if home == "source":
        return source
    layout = lay_out(source, sections, bits, block_size)
    if home == "file":
        try:
            _build(path, source, sections, layout, f"{bits}-bit weights")
            found = _open(path, source)
        except (FolderError, OSError) as error:
            console.warn(f"{path.parent} cannot be written ({error}): the base weights stay in memory")
        if found is not None:
            return found
    return _in_memory(source, sections, layout)


def cache_folder() -> Path:
    import platformdirs

    named = os.environ.get("EDGELORA_BASE_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("edgelora")) / "base"


def cache_bytes() -> int:
    """Return the bytes that all base files may take together. Raises SettingsError if the variable is no number."""
    text = os.environ.get("EDGELORA_BASE_CACHE_GB", str(CACHE_GB))
    try:
        return int(float(text) * (1 << 30))
    except (ValueError, OverflowError):
        raise SettingsError(f'EDGELORA_BASE_CACHE_GB is "{text}"; a number of gigabytes is wanted') from None


def _key(source: ModelSource, sections: Sequence[Section], bits: int, block_size: int) -> str:
    parts = [source.fingerprint, source.modified, bits, block_size, [dataclasses.astuple(section) for section in sections]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def _home(source: ModelSource, sections: Sequence[Section], bits: int) -> str:
    """Return where the weights best lie: "source", "file" or "memory"."""
    if source.kind == "gguf" or any(section.transposed for section in sections):  # unpacked or turned whenever they are read
        return "file" if bits < 32 else "memory"
    paths = [path for section in sections for group in (*section.groups, section.tables) for path in group]
    stored = 8 * stored_dtype(source, paths[-1]).itemsize
    return "source" if bits == stored else "file" if bits < stored else "memory"


def _open(path: Path, source: ModelSource) -> BaseWeights | None:
    """Map a base file; None where there is none, or one that is damaged."""
    try:
        with path.open("rb") as file:
            layout, start = _read_header(file.read(HEAD), file)
            size = os.fstat(file.fileno()).st_size
            if size != start + layout.num_bytes:
                raise ValueError(f"it has {size} bytes instead of {start + layout.num_bytes}")
            # Read-only: a private writable mapping larger than the machine's memory would be refused.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        console.say(f"{path} is damaged ({error}) and not used")
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # last used now
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        data = torch.from_numpy(np.frombuffer(mapping, np.uint8))
    return BaseWeights(source, layout, data[start:], mapping, start, path)


def _read_header(head: bytes, file: Any) -> tuple[Layout, int]:
    """Return the layout and where the data begin. Raises ValueError, KeyError or TypeError for a damaged header."""
    length = int.from_bytes(head[-8:], "little")
    if len(head) < HEAD or not head.startswith(MAGIC) or length > MAX_HEADER:
        raise ValueError("it does not begin as a base file does")
    text = file.read(length)
    if hashlib.sha256(text).digest() != head[len(MAGIC) : -8]:
        raise ValueError("its header has changed")
    content = json.loads(text)
    places = {name: Place(**{**fields, "shape": tuple(fields["shape"])}) for name, fields in content["places"].items()}
    return Layout(places, tuple((start, stop) for start, stop in content["sections"])), up_to(HEAD + length, ALIGN)


def _header(layout: Layout) -> bytes:
    places = {name: dataclasses.asdict(place) for name, place in layout.places.items()}
    text = json.dumps({"places": places, "sections": layout.sections}, separators=(",", ":")).encode()
    head = MAGIC + hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + text
    return head.ljust(up_to(len(head), ALIGN), b"\0")


def _build(path: Path, source: ModelSource, sections: Sequence[Section], layout: Layout, title: str) -> None:
    """Write the base file. Raises MachineError if the disk is full, FolderError or OSError if the folder is not writable."""
    header = _header(layout)
    size = len(header) + layout.num_bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    make_room(path.parent, size)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=PARTIAL, dir=path.parent)
    try:
        with disk_errors(path), os.fdopen(handle, "wb") as file, console.progress(title, total=len(sections)) as progress:
            file.write(header)
            written = 0

            def write(offset: int, tensor: Tensor) -> None:
                nonlocal written
                file.seek(len(header) + offset)
                file.write(_bytes(tensor).numpy().data)
                written += tensor.nbytes
                if written > SYNC_BYTES:
                    file.flush()
                    os.fsync(file.fileno())
                    written = 0

            for _ in fill(source, sections, layout, write):
                progress.update(1)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        _put(Path(name), path, source)
    finally:
        Path(name).unlink(missing_ok=True)


def _put(made: Path, path: Path, source: ModelSource) -> None:
    """Rename the complete file. Windows replaces no file that another process has mapped: then that one is as good."""
    try:
        made.replace(path)
    except PermissionError:
        if _open(path, source) is None:
            raise


def _in_memory(source: ModelSource, sections: Sequence[Section], layout: Layout) -> BaseWeights:
    data = torch.empty(layout.num_bytes, dtype=torch.uint8)

    def write(offset: int, tensor: Tensor) -> None:
        data[offset : offset + tensor.nbytes] = _bytes(tensor)

    for _ in fill(source, sections, layout, write):
        continue
    return BaseWeights(source, layout, data)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def make_room(folder: Path, size: int) -> None:
    """Remove base files, least recently used first, until one of `size` bytes fits the bound and the disk.

    Raises MachineError if the disk is too full even then.
    """
    for partial in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):  # of a process that was killed
            if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                partial.unlink()
    files = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            files.append((stat.st_mtime_ns, stat.st_size, path))
    files.sort()
    used, limit = sum(entry[1] for entry in files), cache_bytes()
    while files and (used + size > limit or shutil.disk_usage(folder).free < size):
        _, freed, path = files.pop(0)
        used -= freed
        with contextlib.suppress(OSError):  # Windows removes no file that is mapped
            path.unlink()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise MachineError(
            f"the disk is full: the base weights take {size >> 20} MB in {folder}, {free >> 20} MB are free",
            hint="free some space, or name a folder on another disk in EDGELORA_BASE_CACHE",
        )
