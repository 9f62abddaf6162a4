"""Checkpoints: everything that the next step depends on, in one safetensors file that is replaced atomically.

Tensors: `parameter.<name>`; `optimizer.<what>.<name>`, what AdamW holds of it (optimizer.py); `random`, torch's generator.
Metadata: `state`, the State as JSON. The rows of a step follow from seed and step number (batches.py).
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

from edgelora.errors import FolderError
from edgelora.train.optimizer import AdamW, load_state, state_tensors

FOLDER = "checkpoint"
FILE = "state.safetensors"


@dataclass
class State:
    """Where a run stands, apart from tensors."""

    step: int = 0  # optimizer steps done
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
    peak_rss_mb: float = 0.0  # of the processes before this one
    seconds: dict[str, float] = field(default_factory=dict)  # per stage


def save(folder: Path, state: State, parameters: Mapping[str, Tensor], optimizer: AdamW, random: Tensor) -> None:
    """Replace the checkpoint of a run folder; a kill at any moment leaves the old one or the new one, whole.

    `parameters` may hold tensors that are not trained.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {"random": random}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach()
        tensors |= {f"optimizer.{what}.{name}": tensor for what, tensor in state_tensors(optimizer, parameter).items()}
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    partial = target / f".{FILE}.partial"
    save_file(tensors, partial, metadata={"state": json.dumps(dataclasses.asdict(state))})
    sync(partial)
    partial.replace(target / FILE)
    sync(target)


def exists(folder: Path) -> bool:
    return (folder / FOLDER / FILE).is_file()


def restore(folder: Path, parameters: Mapping[str, Tensor], optimizer: AdamW) -> State:
    """Put the tensors of the checkpoint where they were and return its State. Raises FolderError if it does not fit."""
    from safetensors import SafetensorError, safe_open

    path = folder / FOLDER / FILE
    try:
        with safe_open(path, "pt") as file:
            state = State(**json.loads(file.metadata()["state"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path} is damaged: {error}", hint="start again with --overwrite") from None
    strange = set(parameters) ^ {name.removeprefix("parameter.") for name in tensors if name.startswith("parameter.")}
    if strange:
        raise FolderError(f"{path} is of another model or other adapters: {', '.join(sorted(strange)[:5])}")
    held: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, what, name = key.split(".", 2)
            held.setdefault(name, {})[what] = tensor
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            load_state(optimizer, parameter, held.get(name, {}))
    torch.set_rng_state(tensors["random"])
    return state


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows cannot open folders, and needs no such call."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
