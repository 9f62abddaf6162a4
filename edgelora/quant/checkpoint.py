"""The merged folder: what ships, as codes and scales on the grid of `quant/grid.py`.

    model.safetensors   `<path>.codes` uint8 and `<path>.scales` fp32 of every quantized linear or embedding, always as
                        [outputs, inputs] (GPT-2's Conv1D is turned around); every other tensor fp32 under its own name
    edgelora.json       kind "merged"; `layers`: {path: {bits, block_size, shape, error …}}, task, labels, model, settings
    config.json, tokenizer files

A tied head is not stored: it is the embedding's codes and scales.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from edgelora.errors import FolderError
from edgelora.folder import check_files, read_manifest
from edgelora.quant.grid import QuantizedTensor, dequantize

WEIGHTS = "model.safetensors"
BLOCK_SIZES = (16, 32, 64, 128, 256)  # those that MatMulNBits has fast kernels for
DTYPES = {torch.float32: "F32", torch.uint8: "U8"}

Layer = dict[str, Any]  # an entry of the manifest's `layers`


class StreamedSafetensors:
    """Writes a safetensors file tensor by tensor, in any order: memory holds one tensor, never the model.

    Format: https://github.com/huggingface/safetensors#format – 8 bytes of header length, a JSON header, the data. All
    shapes are named at the start. fp32 tensors come before uint8 ones, so that each is aligned in a mapping.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.entries: dict[str, tuple[int, int]] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            self.entries[name] = (offset, size)
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self.waiting = set(self.entries)
        self.file = path.open("wb")
        self.file.write(struct.pack("<Q", len(text)) + text)
        self.file.truncate(self.start + offset)

    def write(self, name: str, tensor: Tensor) -> None:
        offset, size = self.entries[name]
        assert tensor.numel() * tensor.itemsize == size, f"{name} is not of the size that the header names"
        self.file.seek(self.start + offset)
        self.file.write(tensor.detach().contiguous().view(-1).numpy().data)
        self.waiting.discard(name)

    def __enter__(self) -> StreamedSafetensors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        assert kind is not None or not self.waiting, f"tensors never written: {sorted(self.waiting)}"


class MergedCheckpoint:
    """A merged folder, its tensors mapped from the file: reading one costs no memory until its pages are touched."""

    def __init__(self, folder: Path, manifest: dict[str, Any], config: dict[str, Any]) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.manifest = manifest
        self.config = config
        self.layers: dict[str, Layer] = manifest["layers"]
        self.task: str = manifest["task"]
        self.labels: list[str] = manifest["labels"]
        open_file: Any = safe_open
        self._file = open_file(folder / WEIGHTS, framework="pt")
        self._stored: list[str] = list(self._file.keys())

    @classmethod
    def open(cls, folder: Path) -> MergedCheckpoint:
        """Open a merged folder; raises FolderError if a file is missing or differs from the manifest's sha256."""
        from safetensors import SafetensorError

        manifest = read_manifest(folder, "merged")
        if not manifest.get("complete") or not {WEIGHTS, "config.json"} <= set(manifest.get("files", {})):
            raise FolderError(f"{folder} is not complete", hint=f"edgelora merge RUN -o {folder} --overwrite")
        check_files(folder, manifest)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            checkpoint = cls(folder, manifest, config)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise FolderError(f"{folder} is damaged: {error}", hint=f"edgelora merge RUN -o {folder} --overwrite") from None
        checkpoint.check()
        return checkpoint

    def names(self) -> list[str]:
        """Return the tensors' names as a Hugging Face checkpoint has them: `<path>.weight` for a quantized layer."""
        plain = [name for name in self._stored if name.rpartition(".")[0] not in self.layers or name.endswith(".bias")]
        return sorted(plain + [f"{path}.weight" for path in self.layers])

    def shape(self, name: str) -> tuple[int, ...]:
        path = name.removesuffix(".weight")
        if path in self.layers and name != path:
            return tuple(self.layers[path]["shape"])
        return tuple(self._file.get_slice(self._known(name)).get_shape())

    def read(self, name: str) -> Tensor:
        """Return a tensor in fp32; the weight of a quantized layer is dequantized, [outputs, inputs]."""
        path = name.removesuffix(".weight")
        if path in self.layers and name != path:
            return dequantize(self._quantized(path))
        tensor: Tensor = self._file.get_tensor(self._known(name))
        return tensor

    def read_linear(self, path: str) -> QuantizedTensor | Tensor:
        """Return the weight of a linear or embedding layer [outputs, inputs]: on the grid, or fp32 if it is stored so."""
        return self._quantized(path) if path in self.layers else self.read(f"{path}.weight")

    def has(self, name: str) -> bool:
        return name in self._stored or (name.endswith(".weight") and name.removesuffix(".weight") in self.layers)

    def check(self) -> None:
        """Raise FolderError if a layer's codes and scales are not what the manifest's `layers` says."""
        bad = [problem for path in self.layers if (problem := self._problem(path))]
        if bad:
            raise FolderError("\n  ".join([f"{self.folder} is damaged:", *bad]), hint="make it again with --overwrite")

    def _problem(self, path: str) -> str | None:
        try:
            layer = self.layers[path]
            outputs, inputs = layer["shape"]
            bits, block_size = layer["bits"], layer["block_size"]
        except (KeyError, ValueError, TypeError):
            return f"{path}: the manifest's entry needs shape, bits and block_size"
        if bits not in (2, 4, 8) or block_size not in BLOCK_SIZES:
            return f"{path}: {bits} bits in blocks of {block_size}; allowed: 2, 4 or 8 bits in blocks of {BLOCK_SIZES}"
        if not {f"{path}.codes", f"{path}.scales"} <= set(self._stored):
            return f"{path}: no codes or no scales"
        num_blocks = -(-inputs // block_size)
        wanted = [outputs, num_blocks, block_size * bits // 8], [outputs, num_blocks]
        found = tuple(list(self._file.get_slice(f"{path}.{part}").get_shape()) for part in ("codes", "scales"))
        return None if found == wanted else f"{path}: codes and scales are {found}, the manifest says {wanted}"

    def _quantized(self, path: str) -> QuantizedTensor:
        layer = self.layers[path]
        codes, scales = self._file.get_tensor(f"{path}.codes"), self._file.get_tensor(f"{path}.scales")
        return QuantizedTensor(codes, scales, layer["bits"], layer["block_size"], layer["shape"][1])

    def _known(self, name: str) -> str:
        if name not in self._stored:
            raise FolderError(f"{self.folder} has no tensor {name}")
        return name
