"""`edgelora merge`: a model, with or without an adapter, rounded once onto the grid that ships.

Streams: each layer is read, gets its adapter's update in fp32, is rounded a few rows at a time and written at its place in
the file. Memory holds one layer's weight (two where an adapter changes it), never the model.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgelora.errors import FolderError, SettingsError, did_you_mean
from edgelora.folder import new_folder, read_manifest, refuse_existing, write_json, write_manifest
from edgelora.models.tensors import CLASSIFICATION, GENERATION, decoder_layout, encoder_layout, guess_task
from edgelora.quant.bits import PRECISION_BITS, choose_bits
from edgelora.quant.checkpoint import WEIGHTS, Layer, StreamedSafetensors
from edgelora.quant.measure import relative_error, round_layer

if TYPE_CHECKING:
    from edgelora.adapters.adapted import Adapted
    from edgelora.adapters.peft_format import AdapterFile
    from edgelora.models.source import ModelSource

BLOCK_SIZES = (32, 64)
TASK_TYPES = {"SEQ_CLS": CLASSIFICATION, "CAUSAL_LM": GENERATION}


@dataclass(frozen=True)
class Inputs:
    """What a merge reads, and what the manifest says about it. Tokenizer and config come from `folder`."""

    adapted: Adapted
    task: str
    labels: list[str]
    folder: Path
    facts: dict[str, Any]  # the run's settings and results
    grid: dict[str, Any]  # what the run was trained on; empty where it was not


def merge(
    run: Path | None,
    out: Path,
    *,
    adapter: Path | None = None,
    model: str | None = None,
    precision: str = "int4",
    block_size: int = 32,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the merged folder `out` from a RUN, from a PEFT adapter and its model, or from a model alone.

    Returns the figures of `--json`: layers, size, errors, and `table`, rows for people. Raises UserError for wrong inputs.
    """
    if precision not in PRECISION_BITS:
        allowed = f"allowed: {', '.join(PRECISION_BITS)}.{did_you_mean(precision, PRECISION_BITS)}"
        raise SettingsError(f'precision "{precision}" is not known; {allowed}')
    if block_size not in BLOCK_SIZES:
        raise SettingsError(f"block size {block_size} is not allowed; allowed: {', '.join(map(str, BLOCK_SIZES))}")
    refuse_existing(out, overwrite=overwrite)
    with torch.inference_mode():
        inputs = gather(run, adapter, model)
        bits = plan_bits(inputs.adapted, precision, block_size, inputs.grid)
        with new_folder(out, overwrite=overwrite) as staging:
            layers = write_weights(inputs.adapted, staging / WEIGHTS, bits, block_size)
            write_companions(inputs, staging)
            source = inputs.adapted.source
            base = {"reference": source.reference, "fingerprint": source.fingerprint, "license": source.license}
            facts = {"task": inputs.task, "labels": inputs.labels, "model": base, "precision": precision, **inputs.facts}
            write_manifest(staging, "merged", layers=layers, **facts)
            size_mb = sum(path.stat().st_size for path in staging.iterdir()) / 2**20
    return {
        "output": str(out),
        "task": inputs.task,
        "precision": precision,
        "layers": len(layers),
        "layers_8_bits": [path for path, layer in layers.items() if layer["bits"] == 8],
        "size_mb": round(size_mb, 1),
        **average(list(layers.values())),
        "table": table(layers),
    }


def gather(run: Path | None, adapter: Path | None, model: str | None) -> Inputs:
    """Open what is to be merged; raises UserError if it does not fit together or a tensor is missing."""
    from edgelora.adapters.adapted import Adapted, num_labels
    from edgelora.adapters.scales import load_trained as load
    from edgelora.models.families import decoder_spec
    from edgelora.models.source import open_model

    manifest = read_manifest(run, "run") if run is not None else {}
    reference = model or manifest.get("model", {}).get("reference")
    if reference is None:
        raise SettingsError(
            "nothing to merge: neither a run nor a model", hint="edgelora merge --adapter DIR --model MODEL -o OUT"
        )
    source = open_model(reference)
    if run is not None:
        check_base(source, manifest, run)
    place = run or adapter
    file = load(place) if place is not None else None
    task = manifest.get("task") or guess_adapter_task(file, source.config)
    layout = encoder_layout(source.config) if task == CLASSIFICATION else decoder_layout(decoder_spec(source.config))
    adapted = Adapted.build(source, file, layout)
    labels = list(manifest.get("labels") or [])
    if task == CLASSIFICATION:
        labels = check_labels(labels, num_labels(adapted), source.config)
    facts: dict[str, Any] = {key: manifest[key] for key in ("settings", "results") if key in manifest}
    return Inputs(adapted, task, labels, run or source.folder, facts, manifest.get("grid", {}))


def check_base(source: ModelSource, manifest: dict[str, Any], run: Path) -> None:
    trained_on = manifest["model"]["fingerprint"]
    if not manifest.get("complete"):
        raise FolderError(f"{run} has not finished training", hint=f"edgelora finetune MODEL DATA -o {run} --resume")
    if source.fingerprint != trained_on:
        raise FolderError(
            f"{run} was trained on another model than {source.reference}: its fingerprint was {trained_on}, "
            f"this one's is {source.fingerprint}",
            hint="name the model that it was trained on with --model",
        )


def guess_adapter_task(adapter: AdapterFile | None, config: dict[str, Any]) -> str:
    """Return the task that the adapter's `task_type` names, else that of the model's architecture."""
    named = TASK_TYPES.get((adapter.task_type if adapter else None) or "")
    return named or guess_task(config)


def check_labels(labels: list[str], rows: int, config: dict[str, Any]) -> list[str]:
    """Return the labels of a classification head with `rows` outputs: the run's, else the config's, else LABEL_0, …"""
    if labels and len(labels) != rows:
        raise FolderError(f"the classification head has {rows} outputs for {len(labels)} labels")
    named = config.get("id2label") or {}
    if not labels and len(named) == rows:
        labels = [str(named[key]) for key in sorted(named, key=int)]
    return labels or [f"LABEL_{i}" for i in range(rows)]


def plan_bits(adapted: Adapted, precision: str, block_size: int, trained: dict[str, Any]) -> dict[str, int]:
    """Return the bits of each layer that ships rounded: those it was trained with, else by the rule of `quant/bits.py`."""
    layout = adapted.layout
    paths = (*layout.embeddings, *layout.linears)
    shapes = {path: (shape[0], shape[1]) for path in paths if (shape := adapted.shape(f"{path}.weight"))}
    if (trained.get("precision"), trained.get("block_size")) == (precision, block_size):
        return {path: trained["bits"].get(path, 8) for path in shapes}
    errors = {}
    if PRECISION_BITS[precision] == 4:
        for path in layout.linears:
            base, merged = adapted.weight(path)
            errors[path] = relative_error(base if merged is None else merged, 4, block_size)
    return choose_bits(precision, shapes, errors, set(layout.embeddings))


def write_weights(adapted: Adapted, path: Path, bits: dict[str, int], block_size: int) -> dict[str, Layer]:
    """Write model.safetensors; return the manifest's `layers`, with each layer's measured error."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    shapes = {name: adapted.shape(name) for name in adapted.layout.names()}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layer not in bits:
            tensors[name] = torch.float32, shape
            continue
        blocks = (shape[0], -(-shape[1] // block_size))
        tensors[f"{layer}.codes"] = torch.uint8, (*blocks, block_size * bits[layer] // 8)
        tensors[f"{layer}.scales"] = torch.float32, blocks
    layers: dict[str, Layer] = {}
    quantizable = {*adapted.layout.embeddings, *adapted.layout.linears}
    with StreamedSafetensors(path, tensors) as file:
        for name, shape in shapes.items():
            layer = name.removesuffix(".weight")
            if layer in bits:
                rounded = round_layer(*adapted.weight(layer), bits[layer], block_size)
                file.write(f"{layer}.codes", rounded.tensor.codes)
                file.write(f"{layer}.scales", rounded.tensor.scales)
                layers[layer] = {"bits": bits[layer], "block_size": block_size, "shape": list(shape), **rounded.figures()}
            elif layer in quantizable and name.endswith(".weight"):
                base, merged = adapted.weight(layer)
                file.write(name, (base if merged is None else merged).float())
            else:
                file.write(name, adapted.plain(name).float())
    return layers


def write_companions(inputs: Inputs, staging: Path) -> None:
    """Copy the tokenizer and write config.json."""
    import shutil

    from edgelora.adapters.adapted import merged_config
    from edgelora.tokenizer import TOKENIZER_FILES

    for name in TOKENIZER_FILES:
        if (inputs.folder / name).is_file():
            shutil.copyfile(inputs.folder / name, staging / name)
    write_json(staging / "config.json", merged_config(inputs.adapted, inputs.labels))


def average(layers: Sequence[Layer]) -> dict[str, float]:
    """Return the mean of each measured figure over the layers that have it."""
    means = {}
    for name in ("error", "delta", "delta_kept", "delta_noise"):
        values = [layer[name] for layer in layers if name in layer]
        if values:
            means[name] = float(f"{statistics.fmean(values):.4g}")
    return means


def table(layers: dict[str, Layer]) -> list[dict[str, Any]]:
    """Return a row for each kind of layer and number of bits: how many, mean and worst error, what was kept of the update."""
    groups: dict[tuple[str, int], list[Layer]] = {}
    for path, layer in layers.items():
        groups.setdefault((re.sub(r"\d+", "*", path), layer["bits"]), []).append(layer)
    rows = []
    for (kind, bits), group in groups.items():
        means = average(group)
        worst = max(layer["error"] for layer in group)
        row = {"layers": kind, "count": len(group), "bits": bits, "error": means["error"], "worst": float(f"{worst:.4g}")}
        rows.append(
            {**row, "delta": means.get("delta"), "delta kept": means.get("delta_kept"), "noise": means.get("delta_noise")}
        )
    return rows
