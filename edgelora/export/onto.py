"""`edgelora export RUN --onto BUNDLE`: what a run learned, as a small file of a base bundle that other runs share.

LoRA on a grid bundle is another function than LoRA inside the rounding: Q(W0) + s·BA where the latter has Q(W0 + s·BA). It is
what was trained only where the run's frozen weights were those codes and scales themselves: a run of `--precision fp32` on the
merged folder that the bundle was exported from. That is checked layer by layer; any other adapter of the same model is measured
on the run's held-out rows, and refused where it keeps too little of what it gained.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora import console
from edgelora.adapters import peft_format
from edgelora.bundle import Bundle, open_bundle
from edgelora.errors import FolderError, SettingsError
from edgelora.export.adapters import refuse_unbranched, tensors
from edgelora.folder import MANIFEST, disk_errors, lock, new_folder, read_manifest, refuse_existing, sha256, write_json
from edgelora.held_out import held_out, load_reference
from edgelora.merging.merge import check_base
from edgelora.models.families import decoder_spec
from edgelora.models.linear import FrozenWeight
from edgelora.models.source import ModelSource, open_model
from edgelora.models.tensors import decoder_layout
from edgelora.quant.grid import QuantizedTensor
from edgelora.report import Results, line, refuse_lost_gain, with_kept
from edgelora.run.adapters import Adapter
from edgelora.run.model import Model
from edgelora.run.predictor import OnnxPredictor
from edgelora.scales_delta import codes_digest, read_delta, write_delta

if TYPE_CHECKING:
    from edgelora.adapters.peft_format import AdapterFile

FOLDER = "adapters"
SUFFIXES = {"lora": ".onnx_adapter", "scales": ".safetensors"}
NAMES = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
BLOCK_SIZE = 32  # of frozen weights in training


@dataclass(frozen=True)
class Candidate:
    """A run that is to become an adapter of a bundle."""

    run: Path
    manifest: dict[str, Any]
    source: ModelSource
    name: str

    @property
    def kind(self) -> str:
        return "scales" if (self.manifest.get("settings") or {}).get("method") == "scales" else "lora"


def add_adapter(
    run: Path,
    bundle: Path,
    *,
    name: str | None = None,
    out: Path | None = None,
    model: str | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Add what `run` learned to `bundle` under `name` (default: the run folder's), or to a copy of it at `out`.

    `force` adds an adapter that keeps too little of its gain on this base. Returns the figures of `--json`; `results` has the
    run's held-out rows scored in the bundle. Raises FolderError for an adapter of another base.
    """
    opened = open_bundle(bundle)
    candidate = open_candidate(run, name, model, opened)
    known = opened.manifest.get("adapters") or {}
    if out is not None:
        refuse_existing(out, overwrite=overwrite, inputs=(run,))
    elif candidate.name in known and not overwrite:
        raise SettingsError(
            f'{bundle} has an adapter "{candidate.name}" already', hint="add --overwrite, or another name with --name"
        )
    with tempfile.TemporaryDirectory() as work, console.progress(f"adding {candidate.name}") as bar:
        file = Path(work) / f"{candidate.name}{SUFFIXES[candidate.kind]}"
        bar.update(stage="base")
        layers = graph_layers(opened)
        write = write_scales if candidate.kind == "scales" else write_lora
        facts = write(candidate, opened, layers, file)
        bar.update(stage="evaluate")
        results = score(candidate, opened, file)
        refuse_lost_gain(results, "onnx", advice(candidate, run), force=force)
        entry = {"kind": candidate.kind, "size_kb": round(file.stat().st_size / 1024, 1), **facts, **card(candidate, results)}
        if out is None:
            with lock(bundle), disk_errors(bundle):
                place(bundle, candidate.name, file, entry)
        else:
            with new_folder(out, overwrite=overwrite) as staging:
                shutil.copytree(bundle, staging, dirs_exist_ok=True)
                place(staging, candidate.name, file, entry)
    figures = {key: entry[key] for key in ("kind", "file", "size_kb", *facts)}
    return {"output": str(out or bundle), "adapter": candidate.name, **figures, "results": results}


def open_candidate(run: Path, name: str | None, model: str | None, bundle: Bundle) -> Candidate:
    """Open a run and its model. Raises UserError where it is none, not complete, of another task, or cannot have that name."""
    manifest = read_manifest(run, "run")
    chosen = name or run.resolve().name
    if not re.fullmatch(NAMES, chosen):
        raise SettingsError(
            f'"{chosen}" cannot be the name of an adapter; allowed: up to 64 letters, digits, ".", "_" and "-", a letter or '
            "digit first",
            hint="--name NAME",
        )
    if manifest["task"] != bundle.task:
        raise SettingsError(f"{run} is for {manifest['task']}, {bundle.folder} for {bundle.task}")
    if list(manifest.get("labels") or []) != bundle.labels:
        raise SettingsError(f"{run} has other labels than {bundle.folder}", hint=f"edgelora export {run} -o BUNDLE")
    source = open_model(model or manifest["model"]["reference"])
    check_base(source, manifest, run)
    return Candidate(run, manifest, source, chosen)


def graph_layers(bundle: Bundle) -> dict[str, QuantizedTensor]:
    """Return the codes and scales of every linear layer on the grid in a bundle's graph, by path, mapped from its file."""
    import onnx_ir as ir
    import torch

    found = {node.name: node for node in ir.load(bundle.model_path).graph}
    layers = {}
    for name, facts in bundle.manifest["nodes"].items():
        node = found[name]
        values = [node.inputs[index] for index in (1, 2)]
        codes, scales = (value.const_value.numpy() for value in values if value is not None and value.const_value is not None)
        for path, (start, stop) in facts["rows"].items():
            parts = [torch.from_numpy(np.array(array[start:stop])) for array in (codes, scales)]
            layers[path] = QuantizedTensor(
                parts[0], parts[1], facts["bits"], facts["block_size"], node.attributes["K"].as_int()
            )
    return layers


def write_scales(candidate: Candidate, bundle: Bundle, layers: Mapping[str, QuantizedTensor], file: Path) -> dict[str, Any]:
    """Write the run's scales, with the base's own of the layers that share a product with a trained one."""
    delta = read_delta(candidate.run)
    digests = {path: codes_digest(layer.codes.numpy(), layer.bits, layer.block_size) for path, layer in layers.items()}
    delta.refuse_other(digests, str(bundle.folder))
    scales = dict(delta.scales)
    for facts in bundle.manifest["nodes"].values():
        if set(facts["rows"]) & set(delta.scales):
            scales |= {path: layers[path].scales.numpy() for path in facts["rows"] if path not in delta.scales}
    write_delta(file, dataclasses.replace(delta, scales=scales))
    return {"layers": len(delta.scales), "base": "exact"}


def write_lora(candidate: Candidate, bundle: Bundle, layers: Mapping[str, QuantizedTensor], file: Path) -> dict[str, Any]:
    """Write A and s·B for the graph's inputs, after a look at the base: "exact" or "rounded"."""
    import onnxruntime as ort

    products = bundle.manifest.get("products")
    if not products:
        raise SettingsError(
            f"{bundle.folder} has no place for adapters",
            hint=f"edgelora export {candidate.source.reference} --adapters swap -o BUNDLE makes a base that has",
        )
    adapter = peft_format.load(candidate.run)
    refuse_unbranched(adapter, {path for rows in products.values() for path in rows}, str(candidate.run))
    other = other_layers(candidate, layers)
    if other or not layers:
        refuse_other_model(candidate, bundle)
    if other:
        warn_rounded(candidate, bundle, len(other), len(layers))
    values = tensors(adapter, products)
    container = ort.AdapterFormat()
    container.set_adapter_version(1)
    container.set_model_version(1)
    container.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in values.items()})
    container.export_adapter(str(file))
    return {"rank": most(adapter), "layers": len(adapter.factors), "base": "rounded" if other else "exact"}


def most(adapter: AdapterFile) -> int:
    return max(factors.rank for factors in adapter.factors.values())


def other_layers(candidate: Candidate, layers: Mapping[str, QuantizedTensor]) -> list[str]:
    """Return the paths of the bundle's layers whose codes or scales are not the weights that the run was trained on."""
    source, bits = candidate.source, int(candidate.manifest["plan"]["base_bits"])
    layout = decoder_layout(decoder_spec(source.config))
    if not layers:  # a fp32 bundle: the fingerprint of the model says the rest
        return [] if bits == 32 and not candidate.manifest.get("grid") else list(layout.linears)
    # On the grid, the forward pass had the update inside the rounding; weights of 16 and 32 bits are not rounded.
    if candidate.manifest.get("grid") or (source.merged is None and bits > 8):
        return list(layers)
    other = []
    for path, layer in layers.items():
        read = source.read_linear(path, transposed=layout.transposed and path in layout.linears)
        kept = FrozenWeight.store(read, bits if path in layout.linears else max(bits, 8), BLOCK_SIZE).data
        same = isinstance(kept, QuantizedTensor) and (kept.bits, kept.block_size) == (layer.bits, layer.block_size)
        if not (same and isinstance(kept, QuantizedTensor) and equal(kept, layer)):
            other.append(path)
    return other


def equal(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    return np.array_equal(one.codes, other.codes) and np.array_equal(one.scales, other.scales)


def refuse_other_model(candidate: Candidate, bundle: Bundle) -> None:
    """Raise FolderError unless run and bundle come from the same model, however it was rounded since."""
    source = candidate.source
    own = {source.fingerprint}
    if source.merged is not None:
        own.add(str((source.merged.manifest.get("model") or {}).get("fingerprint")))
    base = bundle.manifest.get("model") or {}
    if base.get("fingerprint") not in own:
        raise FolderError(
            f"{candidate.run} does not fit {bundle.folder}: it was trained on {source.reference}, the bundle holds "
            f"{base.get('reference', 'another model')}, and their weights differ",
            hint=f"edgelora export {source.reference} --adapters swap -o BUNDLE",
        )


def warn_rounded(candidate: Candidate, bundle: Bundle, count: int, total: int) -> None:
    on_grid = bool(candidate.manifest.get("grid"))
    how = "with its update inside the rounding" if on_grid else f"on other weights in {count} of {total or count} layers"
    console.warn(f"{candidate.run} was trained {how}; beside the weights of {bundle.folder} it is another function")


def score(candidate: Candidate, bundle: Bundle, file: Path) -> Results:
    """Return the run's table with the row "onnx": the bundle with the adapter on the run's held-out rows."""
    results = [row for row in candidate.manifest.get("results") or [] if row.get("what") != "onnx"]
    model = Model(bundle, native=False)
    model.put_on(Adapter(candidate.name, candidate.kind, file))
    held = held_out(candidate.run, candidate.manifest)
    if held is None:
        return results
    reference = load_reference(candidate.run, candidate.source, held.task)
    generate = any("exact_match" in row for row in results)
    metrics = held.score_bundle(OnnxPredictor(model), reference, generate=generate)
    return with_kept([*results, line("onnx", metrics, precision=bundle.precision)])


def advice(candidate: Candidate, run: Path) -> list[str]:
    """Return what keeps more of an adapter's gain."""
    model = candidate.source.reference
    return [
        f"edgelora export {run} -o BUNDLE: merged, a bundle of its own",
        f"edgelora merge --model {model} -o base; edgelora finetune base DATA --precision fp32 -o RUN; edgelora export base "
        "--adapters swap -o BUNDLE: trains on the integers that ship",
        "edgelora finetune … --method scales: swaps at no cost of decoding",
    ]


def card(candidate: Candidate, results: Results) -> dict[str, Any]:
    """Return what a model card says of an adapter."""
    manifest = candidate.manifest
    data = Path(str(manifest["data"])).name if manifest.get("data") else None
    return {
        "task": manifest["task"],
        "model": manifest["model"],
        "data": data,
        "licenses": {"data": manifest.get("data_license")},
        "settings": manifest.get("settings", {}),
        "results": results,
    }


def place(folder: Path, name: str, file: Path, entry: dict[str, Any]) -> None:
    """Put an adapter's file into a bundle and enter it in the manifest: a reader sees the old adapter or the new one."""
    manifest = read_manifest(folder, "bundle")
    adapters = dict(manifest.get("adapters") or {})
    old = adapters.get(name, {}).get("file")
    relative = f"{FOLDER}/{name}{file.suffix}"
    if relative == old:  # what the manifest names stays as it is until the new manifest is there
        relative = f"{FOLDER}/{name}.2{file.suffix}"
    (folder / FOLDER).mkdir(exist_ok=True)
    partial = folder / FOLDER / f".{name}.partial"
    shutil.copyfile(file, partial)
    partial.replace(folder / relative)
    entry["file"] = relative
    files = {**{key: value for key, value in manifest["files"].items() if key != old}, relative: sha256(folder / relative)}
    write_json(folder / MANIFEST, {**manifest, "adapters": {**adapters, name: entry}, "files": files})
    if old is not None:
        (folder / old).unlink(missing_ok=True)
