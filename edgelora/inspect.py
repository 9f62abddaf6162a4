"""`edgelora inspect`: what a run, a merged folder, a bundle or a model holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import console
from edgelora.errors import FolderError
from edgelora.folder import MANIFEST, check_files, read_manifest

if TYPE_CHECKING:
    from edgelora.adapters.lora import Factors


def inspect(path: str | Path) -> dict[str, Any]:
    """Return what a folder (or model reference) holds; `kind` says what it is.

    run     adapters: per layer rank, norm and singular values of the update; or scales: per layer; trained parameters
    merged  layers: bits, block size, shape, error, bytes
    bundle  nodes with bits, block size and accuracy level; misses: nodes that no fast kernel takes, with the reason
    model   tensors by shape; what an export of it would hold

    Raises FolderError or ModelError for what is none of these.
    """
    folder = Path(path).expanduser()
    if not (folder / MANIFEST).is_file():
        return inspect_model(str(path))
    manifest = read_manifest(folder, "run", "merged", "bundle", "store")
    look = {"run": inspect_run, "merged": inspect_merged, "bundle": inspect_bundle}.get(manifest["kind"])
    if look is None:
        raise FolderError(f"{folder} is a {manifest['kind']} folder; a run, merged or bundle folder or a model is wanted")
    facts: dict[str, Any] = {
        key: manifest[key]
        for key in ("kind", "tool_version", "complete", "task", "labels", "model", "results")
        if key in manifest
    }
    return {**facts, "size_mb": size_mb(folder), "damage": damage(folder, manifest), **look(folder, manifest)}


def damage(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the files that are not as the manifest has them."""
    try:
        check_files(folder, manifest)
    except FolderError as error:
        return [line.strip() for line in error.message.splitlines()[1:]]
    return []


def inspect_run(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    from edgelora.adapters.peft_format import load

    if (manifest.get("settings") or {}).get("method") == "scales":
        return inspect_scales(folder, manifest)
    adapter = load(folder)
    rows = [{"layer": path, **look_at_factors(factors)} for path, factors in adapter.factors.items()]
    saved = {name: list(tensor.shape) for name, tensor in adapter.saved_modules.items()}
    trained = sum(row["parameters"] for row in rows) + sum(tensor.numel() for tensor in adapter.saved_modules.values())
    return {"settings": manifest.get("settings", {}), "trained_parameters": trained, "adapters": rows, "saved_modules": saved}


def inspect_scales(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    from edgelora.scales_delta import FILE, read_delta

    delta = read_delta(folder)
    rows = [
        {"layer": path, "parameters": scales.size, "bits": manifest["grid"]["bits"][path], "blocks": scales.shape[1]}
        for path, scales in delta.scales.items()
    ]
    trained = sum(row["parameters"] for row in rows) + sum(array.size for array in delta.tensors.values())
    saved = {name: list(array.shape) for name, array in delta.tensors.items()}
    return {
        "settings": manifest.get("settings", {}),
        "trained_parameters": trained,
        "delta_mb": round((folder / FILE).stat().st_size / 2**20, 2),
        "base": delta.base,
        "scales": rows,
        "saved_modules": saved,
    }


def look_at_factors(factors: Factors) -> dict[str, Any]:
    """Return rank, parameters, Frobenius norm and singular values of the update sBA, without forming it.

    With B = Q_B R_B and Aᵀ = Q_A R_A the singular values of BA are those of R_B R_Aᵀ, which is rank × rank.
    """
    import torch

    right = torch.linalg.qr(factors.b.float()).R
    left = torch.linalg.qr(factors.a.float().t()).R
    values = torch.linalg.svdvals(right @ left.t()) * abs(factors.scale)
    return {
        "rank": factors.rank,
        "parameters": factors.a.numel() + factors.b.numel(),
        "norm": rounded(float(values.square().sum().sqrt())),
        "singular_values": [rounded(value) for value in values.tolist()],
    }


def inspect_merged(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for path, layer in manifest["layers"].items():
        outputs, inputs = layer["shape"]
        blocks = outputs * -(-inputs // layer["block_size"])
        rows.append({"layer": path, **layer, "bytes": blocks * (layer["block_size"] * layer["bits"] // 8 + 4)})
    return {"precision": manifest.get("precision"), "bits": count_bits(manifest["layers"]), "layers": rows}


def inspect_bundle(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    from edgelora.folder import inside
    from edgelora.kernels import look_at_graph

    try:
        path = inside(folder, manifest["model_file"])
        precision, exceptions = manifest["precision"], dict(manifest.get("exceptions") or {})
        facts = {key: manifest.get(key) for key in ("precision", "device", "max_length", "exceptions", "licenses", "verify")}
        layers = dict(manifest.get("layers") or {})
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{folder / MANIFEST} is damaged: {error}", hint="export it again with --overwrite") from None
    if not path.is_file():
        raise FolderError(f"{folder} is damaged: {manifest['model_file']} is missing", hint="export it again with --overwrite")
    facts["adapters"] = [look_at_entry(name, entry) for name, entry in (manifest.get("adapters") or {}).items()]
    return {**facts, "bits": count_bits(layers), **look_at_graph(path, exceptions, quantized=precision != "fp32")}


def look_at_entry(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a bundle's manifest says of one of its adapters, with its loss in ONNX Runtime on held-out rows."""
    keys = ("kind", "rank", "layers", "size_kb", "base", "data", "file")
    scored: dict[str, Any] = next((row for row in entry.get("results") or [] if row.get("what") == "onnx"), {})
    return {"adapter": name, **{key: entry.get(key) for key in keys}, "loss": scored.get("loss"), "kept": scored.get("kept")}


def inspect_model(reference: str) -> dict[str, Any]:
    from edgelora.models.source import open_model

    source = open_model(reference)
    shapes = {name: source.shape(name) for name in source.names()}
    groups = Counter("×".join(map(str, shape)) for shape in shapes.values())
    return {
        "kind": "model",
        "reference": reference,
        "model_type": source.config.get("model_type"),
        "architectures": source.config.get("architectures"),
        "license": source.license,
        "parameters": sum(product(shape) for shape in shapes.values()),
        "tensors": [{"shape": shape, "count": count} for shape, count in groups.most_common()],
    }


def product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def count_bits(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return how many layers have how many bits."""
    return {str(bits): count for bits, count in sorted(Counter(layer["bits"] for layer in layers.values()).items())}


def size_mb(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20, 1)


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def show(found: Mapping[str, Any]) -> None:
    """Print what `inspect` returned, for people."""
    simple = {
        key: value for key, value in found.items() if isinstance(value, str | int | float) and not isinstance(value, bool)
    }
    console.table(f"{found['kind']}", [simple])
    for name in ("adapters", "scales", "layers", "nodes", "tensors", "results"):
        rows = [
            {key: short(value) for key, value in row.items() if not isinstance(value, dict)} for row in found.get(name) or []
        ]
        if rows:
            console.table(name, group(rows) if name in ("scales", "layers", "nodes") else rows)
    if found.get("damage"):
        console.warn("\n  ".join(["files differ from the manifest:", *found["damage"]]))
    if found.get("misses"):
        console.warn("\n  ".join([found["summary"], *(f"{miss['node']}: {miss['reason']}" for miss in found["misses"])]))
    elif "summary" in found:
        console.say(str(found["summary"]))


def group(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for the layers that are alike but for their number, with a count, and the mean of their figures."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        first, *others = row
        kind = re.sub(r"\d+", "*", str(row[first]))
        key = (kind, *(row[name] for name in others if not isinstance(row[name], float)))
        groups.setdefault(key, []).append({**row, first: kind})
    found = []
    for alike in groups.values():
        means = {
            key: rounded(sum(row[key] for row in alike) / len(alike))
            for key, value in alike[0].items()
            if isinstance(value, float)
        }
        found.append({**alike[0], **means, "count": len(alike)})
    return found


def short(value: Any) -> Any:
    """Return a list as text, its first four entries."""
    if isinstance(value, list):
        return " ".join(str(entry) for entry in value[:4]) + (" …" if len(value) > 4 else "")
    return value
