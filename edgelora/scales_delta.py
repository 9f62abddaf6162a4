"""What scales-only training ships per task: the block scales of the layers it changed, one small file over a shared base.

    scales.safetensors   `<path>.scales` bf16 [N, ceil(K / block_size)] of each layer, exact: the grid has scales that bf16
                         can represent; a trained classification head fp32 under its own names
    metadata             format "edgelora-scales", version "1"; model: the base's reference; layers: JSON {path: sha256} of the
                         codes of all the base's linear layers; base: the sha256 of these, which names the base

Reading it takes numpy alone (tensor_file.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import FolderError
from edgelora.tensor_file import read_array, read_header, write_tensors

FILE = "scales.safetensors"
FORMAT, VERSION = "edgelora-scales", "1"
SUFFIX = ".scales"

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Delta:
    """scales: fp32 `[N, blocks]` by path; tensors: what else was trained, by name; layers: sha256 of the codes by path."""

    scales: dict[str, Array]
    layers: dict[str, str]
    tensors: dict[str, Array] = field(default_factory=dict)
    model: str = ""

    @property
    def base(self) -> str:
        return fingerprint(self.layers)

    def refuse_other(self, layers: Mapping[str, str], name: str) -> None:
        """Raise FolderError unless `layers`, the codes' sha256 of a base by path, are those that the scales were trained on.

        Layers of the base that the delta does not know (an embedding) are no concern of it.
        """
        missing = [f"{path}: not on the grid there" for path in self.layers if path not in layers]
        changed = [f"{path}: other codes" for path, digest in self.layers.items() if layers.get(path, digest) != digest]
        if problems := missing + changed:
            shown = [*problems[:5], *([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])]
            trained = f" of {self.model}" if self.model else ""
            raise FolderError(
                "\n  ".join([f"these scales were trained with other codes than those of {name}:", *shown]),
                hint=f"edgelora export makes their base{trained}, at the precision that they were trained with",
            )


def codes_digest(codes: NDArray[np.uint8], bits: int, block_size: int) -> str:
    """Return the sha256 that names a layer's codes, uint8 `[N, blocks, block_size * bits / 8]`."""
    digest = hashlib.sha256(f"{bits} {block_size} {list(codes.shape)} ".encode())
    digest.update(np.ascontiguousarray(codes).reshape(-1).data)
    return digest.hexdigest()


def fingerprint(layers: Mapping[str, str]) -> str:
    """Return the sha256 that names a base by the codes of its layers, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(layers.items())).encode()).hexdigest()


def write_delta(path: Path, delta: Delta) -> None:
    """Write a delta atomically. The scales must be bf16-representable."""
    stored: dict[str, tuple[str, NDArray[Any]]] = {name: ("F32", array) for name, array in delta.tensors.items()}
    for layer, scales in delta.scales.items():
        bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any(), f"{layer}: scales that bf16 cannot represent"
        stored[layer + SUFFIX] = "BF16", (bits >> 16).astype(np.uint16)
    facts = {"format": FORMAT, "version": VERSION, "model": delta.model, "base": delta.base, "layers": json.dumps(delta.layers)}
    write_tensors(path, stored, facts)


def read_delta(path: Path) -> Delta:
    """Read a delta; `path` is the file or the run folder that has it. Raises FolderError for what is missing or damaged."""
    file = path / FILE if path.is_dir() else path
    try:
        data = file.read_bytes()
    except OSError:
        hint = "edgelora finetune MODEL DATA --method scales makes one"
        raise FolderError(f"there is no file of scales at {file}", hint=hint) from None
    try:
        header, start = read_header(data)
        facts = header.pop("__metadata__")
        if facts["format"] != FORMAT or facts["version"] != VERSION:
            raise ValueError(f'format "{facts["format"]}" {facts["version"]}; "{FORMAT}" {VERSION} is wanted')
        layers = {str(layer): str(digest) for layer, digest in json.loads(facts["layers"]).items()}
        arrays = {name: read_array(data, start, entry).copy() for name, entry in header.items()}  # may be trained on
        scales = {name.removesuffix(SUFFIX): array for name, array in arrays.items() if name.endswith(SUFFIX)}
        tensors = {name: array for name, array in arrays.items() if not name.endswith(SUFFIX)}
        refuse_strange(scales, tensors, layers)
        if fingerprint(layers) != facts["base"]:
            raise ValueError("its layers are not those of its base")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{file} is no file of scales, or damaged: {error}", hint="make it again") from None
    return Delta(scales, layers, tensors, str(facts.get("model", "")))


def refuse_strange(scales: Mapping[str, Array], tensors: Iterable[str], layers: Mapping[str, str]) -> None:
    """Raise ValueError for scales of layers that the base does not have, of another form, or not finite."""
    if not scales:
        raise ValueError("it has no scales")
    for path, array in scales.items():
        if path not in layers:
            raise ValueError(f"{path} is no layer of its base")
        if array.ndim != 2 or not np.isfinite(array).all():
            raise ValueError(f"the scales of {path} are of shape {list(array.shape)}, or not finite")
