"""The tensors of a PEFT adapter: read without pickle, and held against adapter_config.json before anything is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgelora.adapters.peft_config import CONFIG, settings_of, tokens_of
from edgelora.errors import FolderError
from edgelora.folder import inside_or_cached


def read_tensors(folder: Path, file_name: str) -> dict[str, Tensor]:
    """Return every tensor as stored, mapped from the file where possible.

    Raises FolderError where the file is missing, damaged, or holds what no adapter does.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(inside_or_cached(folder, file_name))
    except (FileNotFoundError, IsADirectoryError):
        pickled = (folder / "adapter_model.bin").exists()
        why = "; adapter_model.bin is a pickle, which can run code and is not read" if pickled else ""
        hint = "save it again from PEFT: model.save_pretrained(FOLDER, safe_serialization=True)" if pickled else None
        raise FolderError(f"{folder} is not an adapter folder: it has no {file_name}{why}", hint=hint) from None
    except SafetensorError as error:
        raise FolderError(f"{folder / file_name} is damaged: {error}") from None
    whole = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if whole:
        raise FolderError(f"{folder / file_name} has values that are not floating point: {', '.join(whole[:10])}")
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
    if bad:
        raise FolderError(f"{folder / file_name} has values that are not finite: {', '.join(bad[:10])}")
    return tensors


def wrong_part(path: str, part: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    """Return a line for each thing that is wrong with the tensors of one layer."""
    names = set(part) - {"lora_magnitude_vector", "lora_diag", "bias"}
    if names not in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}):
        return [f"{path}: {', '.join(sorted(part))}"]
    a, b = (part[name] for name in sorted(names))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return [f"{path}: A of shape {list(a.shape)} and B of shape {list(b.shape)}; [r, K] and [N, r] are wanted"]
    outputs, rank = b.shape
    wanted = {"lora_magnitude_vector": outputs, "bias": outputs, "lora_diag": rank}
    problems = [
        f"{path}: {name} of shape {list(part[name].shape)}; [{size}] is wanted"
        for name, size in wanted.items()
        if name in part and tuple(part[name].shape) != (size,)
    ]
    named = settings_of(config, path)[0]
    return problems if named == rank else [*problems, f"{path}: A and B of rank {rank}; {CONFIG} says {named}"]


def wrong_rows(path: str, rows: Tensor, config: dict[str, Any]) -> list[str]:
    indices = tokens_of(config, path) or []
    fits = rows.ndim == 2 and len(rows) == len(indices) == len(set(indices)) > 0
    return [] if fits else [f"{path}: rows of shape {list(rows.shape)} for {len(indices)} tokens"]


def unfit_parameters(config: dict[str, Any]) -> list[str]:
    """Return a line for each targeted parameter that is no layer's weight: experts that share one, with more dimensions."""
    names = config.get("target_parameters") or []
    return [f"target_parameters: {name} is not the weight of a layer" for name in names if not name.endswith(".weight")]
