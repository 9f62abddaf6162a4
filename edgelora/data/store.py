"""Encoded rows in a folder, mapped into memory: reading one touches its pages only.

store.json   {"rows": N, "arrays": {name: {"dtype": "int32", "shape": null | [sizes after the first]}}}
<name>.bin   the values of all rows, one after the other
<name>.ends  int64 [N]: where each row ends along the first axis; scalars (shape null) have none
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import FolderError
from edgelora.folder import inside, write_json
from edgelora.tasks.base import Example


class StoreWriter:
    """Appends examples to a new store; `close` makes it readable."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.arrays: dict[str, dict[str, Any]] = {}
        self.files: dict[str, IO[bytes]] = {}
        self.ends: dict[str, int] = {}
        self.rows = 0

    def add(self, example: Example) -> None:
        """Append one example; its arrays have the names, types and sizes (but the first) of the first one's."""
        for name, array in example.arrays.items():
            described = {"dtype": array.dtype.name, "shape": list(array.shape[1:]) if array.ndim else None}
            if self.rows == 0:
                self.arrays[name] = described
                self.files[name] = (self.folder / f"{name}.bin").open("wb")
                if array.ndim:
                    self.files[f"{name}.ends"] = (self.folder / f"{name}.ends").open("wb")
            assert self.arrays[name] == described, f"{name} is {described}, of the first row {self.arrays[name]}"
            self.files[name].write(array.tobytes())
            if array.ndim:
                self.ends[name] = self.ends.get(name, 0) + len(array)
                self.files[f"{name}.ends"].write(np.int64(self.ends[name]).tobytes())
        assert example.arrays.keys() == self.arrays.keys()
        self.rows += 1

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        write_json(self.folder / "store.json", {"rows": self.rows, "arrays": self.arrays})


class Store(Sequence[Example]):
    """A store, opened for reading."""

    def __init__(self, folder: Path, rows: int, values: dict[str, NDArray[Any]], ends: dict[str, NDArray[np.int64]]) -> None:
        self.folder, self.rows, self.values, self.ends = folder, rows, values, ends

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Map a store. Raises FolderError where there is none or its files do not fit together."""
        try:
            description = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            rows, values, ends = int(description["rows"]), {}, {}
            for name, array in description["arrays"].items():
                found, shape = map_file(inside(folder, f"{name}.bin"), np.dtype(array["dtype"])), array["shape"]
                if shape is None:
                    fits = len(found) == rows
                else:
                    ends[name] = map_file(inside(folder, f"{name}.ends"), np.dtype(np.int64))
                    fits = len(ends[name]) == rows and int(ends[name][-1]) * math.prod(shape) == len(found)
                    found = found.reshape(-1, *shape) if fits else found
                values[name] = found
                if not fits:
                    raise FolderError(f"{folder} is damaged: {name} does not have the values of {rows} rows")
        except FileNotFoundError as error:
            raise FolderError(f"{folder} is not a store: {Path(error.filename).name} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise FolderError(f"{folder} is damaged: {error}") from None
        return cls(folder, rows, values, ends)

    def __len__(self) -> int:
        return self.rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.rows))]
        if not -self.rows <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        index = int(index) % self.rows
        arrays: dict[str, NDArray[Any]] = {}
        for name, values in self.values.items():
            if name in self.ends:
                start = int(self.ends[name][index - 1]) if index else 0
                arrays[name] = values[start : int(self.ends[name][index])]
            else:
                arrays[name] = np.asarray(values[index])
        return Example(arrays)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The length of each row (tasks/base.py), int64 [N]."""
        if not self.rows:
            return np.zeros(0, dtype=np.int64)
        if "ids" in self.ends:
            return np.diff(self.ends["ids"], prepend=0)
        return np.asarray(self.values["length"], dtype=np.int64) if "length" in self.values else np.ones(self.rows, np.int64)


def map_file(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not path.stat().st_size:  # nothing can be mapped of it
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
