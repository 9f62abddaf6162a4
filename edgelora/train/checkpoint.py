"""Checkpoints: everything that the next step depends on, in one safetensors file that is replaced atomically.

Tensors: `parameter.<name>`, `optimizer.<what>.<name>` of what AdamW holds of it (optimizer.py), and `random`, torch's
generator. Metadata: `state`, the State as JSON. The rows of a step follow from seed and step number (batches.py). Tensors are
written and read one at a time: a checkpoint takes no memory of its size.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgelora.errors import FolderError, ModelError
from edgelora.models.weights import DTYPES, Entry, file_entries, read_entry
from edgelora.train.optimizer import AdamW, load_state, state_tensors

FOLDER = "checkpoint"
FILE = "state.safetensors"


@dataclass
class State:
    """Where a run stands, apart from tensors."""

    step: int = 0  # optimizer steps done
    evaluated: int = 0  # the step after which the validation rows were last scored
    tokens: int = 0  # real tokens of those steps
    timed_tokens: int = 0  # tokens and seconds of the steps that count for the speed: all but a process's first
    timed_seconds: float = 0.0
    loss_sum: float = 0.0  # losses and supervised items since the last evaluation
    loss_items: int = 0
    train_loss: float | None = None  # mean over the supervised items between the last two evaluations
    recent: list[float] = field(default_factory=list)  # mean losses of the last steps, which a spike is told from
    rate_scale: float = 1.0  # halved by a roll-back
    base: dict[str, Any] = field(default_factory=dict)  # metrics before the first step
    best: dict[str, Any] = field(default_factory=dict)  # metrics and step of the adapter that is kept
    worse: int = 0  # evaluations since the best
    kept_prefix: bool | None = None  # whether the frozen layers' outputs are kept on disk; None before it is decided
    peak_rss_mb: float = 0.0  # of the processes before this one
    seconds: dict[str, float] = field(default_factory=dict)  # per stage


def save(folder: Path, state: State, parameters: Mapping[str, Tensor], optimizer: AdamW, random: Tensor) -> None:
    """Replace the checkpoint of a run folder; a kill at any moment leaves the old one or the new one, whole.

    `parameters` may hold tensors that are not trained.
    """
    tensors: dict[str, Tensor] = {"random": random}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach()
        tensors |= {f"optimizer.{what}.{name}": tensor for what, tensor in state_tensors(optimizer, parameter).items()}
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    partial = target / f".{FILE}.partial"
    write_tensors(partial, tensors, {"state": json.dumps(dataclasses.asdict(state))})
    sync(partial)
    partial.replace(target / FILE)
    sync(target)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file (the format: models/weights.py) without a copy of any tensor."""
    types = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    # The widest types first, as the library has them: every tensor begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": types[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(raw(tensor))


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def exists(folder: Path) -> bool:
    return (folder / FOLDER / FILE).is_file()


def restore(folder: Path, parameters: Mapping[str, Tensor], optimizer: AdamW) -> State:
    """Put the tensors of the checkpoint where they were and return its State. Raises FolderError if it does not fit."""
    path = folder / FOLDER / FILE
    try:
        entries = file_entries(path)
        state, random = State(**json.loads(read_metadata(path)["state"])), read_entry(entries["random"]).clone()
    except ModelError as error:
        raise FolderError(f"{path} is damaged: {error.message}", hint="start again with --overwrite") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path} is damaged: {error}", hint="start again with --overwrite") from None
    shapes = {name.removeprefix("parameter."): e.shape for name, e in entries.items() if name.startswith("parameter.")}
    strange = {name for name, _ in shapes.items() ^ {name: tuple(p.shape) for name, p in parameters.items()}.items()}
    if strange:
        raise FolderError(f"{path} is of another model or other adapters: {', '.join(sorted(strange)[:5])}")
    held: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        if key.startswith("optimizer."):
            _, what, name = key.split(".", 2)
            held.setdefault(name, {})[what] = entry
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(read_entry(entries[f"parameter.{name}"]))
            load_state(optimizer, parameter, {what: read_entry(entry).clone() for what, entry in held.get(name, {}).items()})
    torch.set_rng_state(random)
    return state


def read_metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return dict(json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"])


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows cannot open folders, and needs no such call."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
