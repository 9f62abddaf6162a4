"""The adapters of a bundle: one base, many tasks. `edgelora export RUN --onto BUNDLE` puts them there.

    adapters/NAME.onnx_adapter    kind "lora": A and B of every product of the graph, for its optional inputs; the file format
                                  is ONNX Runtime's (AdapterFormat), which onnxruntime-genai reads as well
    adapters/NAME.safetensors     kind "scales": block scales of the layers that were trained (scales_delta.py)

A and B are bound once, beside the cache, and changed between two answers: nothing is loaded again. (ONNX Runtime's own way,
RunOptions.add_active_adapter, is ignored where inputs are bound, and the cache stays in place only where they are.) Scales
replace initializers when a session is opened, so that the kernels pack them like the base's own: decoding costs what it costs
without them, and changing them costs a new session.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import FolderError, SettingsError, did_you_mean
from edgelora.folder import inside
from edgelora.scales_delta import Delta, read_delta

if TYPE_CHECKING:
    import onnxruntime as ort

    from edgelora.bundle import Bundle

KINDS = ("lora", "scales")
PARTS = ("lora_A", "lora_B")
NODE = "/MatMulNBits"

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Adapter:
    """An entry of the manifest's `adapters`; `path` is its file."""

    name: str
    kind: str
    path: Path


def find(bundle: Bundle, name: str) -> Adapter:
    """Return the adapter of that name. Raises SettingsError where the bundle has no such one."""
    known = bundle.manifest.get("adapters") or {}
    if name not in known:
        if not known:
            raise SettingsError(f"{bundle.folder} has no adapters", hint=f"edgelora export RUN --onto {bundle.folder} adds one")
        raise SettingsError(
            f'{bundle.folder} has no adapter "{name}".{did_you_mean(name, known)} It has {", ".join(known)}',
            hint=f"edgelora inspect {bundle.folder}",
        )
    try:
        kind, path = known[name]["kind"], inside(bundle.folder, known[name]["file"])
    except (KeyError, TypeError) as error:
        raise FolderError(f'{bundle.folder} is damaged: the entry of adapter "{name}" ({error})') from None
    if kind not in KINDS:
        raise FolderError(
            f'the adapter "{name}" is of the kind "{kind}", which this EdgeLoRA does not know',
            hint="pip install --upgrade edgelora",
        )
    if not path.is_file():
        raise FolderError(f"{bundle.folder} is damaged: {known[name]['file']} is missing", hint="add the adapter again")
    return Adapter(name, kind, path)


def read_factors(path: Path, inputs: Mapping[str, ort.NodeArg]) -> dict[str, ort.OrtValue]:
    """Return A `[K, r]` and B `[r, N]` by the graph's input names, checked against those inputs.

    Raises FolderError where the file is damaged or made for another graph.
    """
    import onnxruntime as ort

    try:
        values: dict[str, ort.OrtValue] = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    except Exception as error:  # onnxruntime's classes derive from Exception alone
        raise FolderError(f"{path} is damaged: {first_line(error)}", hint="add the adapter again with --overwrite") from None
    problems = [problem for name, value in values.items() if (problem := mismatch(name, value, inputs))]
    ranks: dict[str, set[int]] = {}
    for name, value in values.items():
        product, _, part = name.rpartition(".")
        ranks.setdefault(product, set()).add(value.shape()[PARTS.index(part) - 1] if part in PARTS else -1)
        if {f"{product}.{other}" for other in PARTS} - values.keys():
            problems.append(f"{product}: one of A and B is missing")
    problems += [f"{product}: A and B have ranks {sorted(found)}" for product, found in ranks.items() if len(found) > 1]
    if problems or not values:
        raise FolderError("\n  ".join([f"{path} does not fit the bundle's graph:", *(problems[:10] or ["it is empty"])]))
    return values


def mismatch(name: str, value: ort.OrtValue, inputs: Mapping[str, ort.NodeArg]) -> str | None:
    """Return what is wrong with a tensor for the graph's input of that name."""
    if name not in inputs:
        return f"{name}: the graph has no such input"
    wanted, found = list(inputs[name].shape), list(value.shape())
    same = len(wanted) == len(found) and all(
        isinstance(w, str) or w is None or w == f for w, f in zip(wanted, found, strict=True)
    )
    if not same or value.data_type() != "tensor(float)":
        return f"{name}: {value.data_type()} {found}; float {wanted} is wanted"
    if not np.isfinite(value.numpy()).all():
        return f"{name}: values that are not finite"
    return None


def initializers(bundle: Bundle, adapter: Adapter | None) -> dict[str, ort.OrtValue]:
    """Return the initializers that an adapter replaces when a session is opened, by name: scales and a trained head."""
    if adapter is None or adapter.kind != "scales":
        return {}
    import onnxruntime as ort

    delta = read_delta(adapter.path)
    scales = stacked_scales(delta, bundle.manifest.get("nodes") or {}, adapter.path)
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in {**delta.tensors, **scales}.items()}


def stacked_scales(delta: Delta, nodes: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, Array]:
    """Return the scales `[N, blocks]` of each MatMulNBits node that has trained layers, theirs side by side as in the graph.

    Raises FolderError where the file does not have all layers of such a node, or has one of another form.
    """
    found: dict[str, Array] = {}
    used: set[str] = set()
    for name, facts in nodes.items():
        rows = facts["rows"]
        if not set(rows) & set(delta.scales):
            continue
        used |= set(rows)
        parts = [delta.scales.get(layer) for layer in rows]
        sizes = [stop - start for start, stop in rows.values()]
        if any(part is None or len(part) != size for part, size in zip(parts, sizes, strict=True)):
            raise FolderError(f"{path} does not fit the bundle's graph: {name} needs the scales of {', '.join(rows)}")
        found[name.removesuffix(NODE) + ".scales"] = np.concatenate([part for part in parts if part is not None])
    if unknown := set(delta.scales) - used:
        raise FolderError(f"{path} does not fit the bundle's graph, which has no {sorted(unknown)[0]}")
    return found


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
