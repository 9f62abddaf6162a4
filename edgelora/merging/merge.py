"""`edgelora merge`: a model, with or without an adapter, rounded once onto the grid that ships.

How each layer is stored, and its codes where rows decide them, come from `rounding_plan.py`. Each layer is read, gets its
adapter's update in fp32, is rounded if it is not yet, and written at its place in the file: without rows, memory holds one
layer's weight (two where an adapter changes it), never the model.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgelora.adapters.peft_config import TASK_TYPES
from edgelora.errors import FolderError, SettingsError, did_you_mean
from edgelora.folder import new_folder, read_manifest, refuse_existing, write_json, write_manifest
from edgelora.merging.rounding_plan import RoundingPlan, Wish, plan_rounding
from edgelora.merging.shipped import conclude
from edgelora.models.tensors import guess_task, model_layout
from edgelora.quant.bits import PRECISION_BITS
from edgelora.quant.checkpoint import WEIGHTS, Layer, StreamedSafetensors
from edgelora.quant.measure import measured
from edgelora.tasks import get_task

if TYPE_CHECKING:
    from edgelora.adapters.adapted import Adapted
    from edgelora.adapters.combine import Combination, Recipe
    from edgelora.adapters.peft_format import AdapterFile
    from edgelora.models.source import ModelSource

BLOCK_SIZES = (32, 64)
UNNAMED = (0, 1)  # labels that transformers gives a config.json without any


@dataclass(frozen=True)
class Inputs:
    """What a merge reads, and what the manifest says about it. Tokenizer and config come from `folder`."""

    adapted: Adapted
    task: str
    labels: list[str]
    folder: Path
    facts: dict[str, Any]  # the run's settings and results
    grid: dict[str, Any]  # what the run was trained on; empty where it was not
    notes: list[str]  # what the user should know


def merge(
    run: Path | None,
    out: Path,
    *,
    adapter: Path | Recipe | None = None,
    model: str | None = None,
    precision: str = "int4",
    block_size: int = 32,
    overwrite: bool = False,
    force: bool = False,
    **wishes: Any,
) -> dict[str, Any]:
    """Write the merged folder `out` from a RUN, from a PEFT adapter (or several, by a recipe) and its model, or from a
    model alone.

    wishes: the other fields of `rounding_plan.Wish`. A run that was trained on the grid of `precision` keeps its codes; another
    one is rounded with its own rows, and anything else with those of `calibrate`, if they are given.
    Returns the figures of `--json`: layers, size, errors, `table`, rows for people, and `results`, those of held-out rows.
    Raises UserError for wrong inputs, and unless `force` for a merge that keeps too little of what a run has learned.
    """
    if precision not in PRECISION_BITS:
        allowed = f"allowed: {', '.join(PRECISION_BITS)}.{did_you_mean(precision, PRECISION_BITS)}"
        raise SettingsError(f'precision "{precision}" is not known; {allowed}')
    if block_size not in BLOCK_SIZES:
        raise SettingsError(f"block size {block_size} is not allowed; allowed: {', '.join(map(str, BLOCK_SIZES))}")
    adapters = (adapter,) if isinstance(adapter, Path) else adapter.folders if adapter is not None else ()
    refuse_existing(out, overwrite=overwrite, inputs=(run, model, wishes.get("calibrate"), *adapters))
    with torch.no_grad():
        inputs = gather(run, adapter, model)
        precision = shippable(precision, inputs)
        wish = Wish(precision, block_size, **wishes)
        with new_folder(out, overwrite=overwrite) as staging:
            plan = plan_rounding(inputs, wish, staging)
            layers = write_weights(inputs.adapted, staging / WEIGHTS, plan)
            write_companions(inputs, staging)
            source = inputs.adapted.source
            base = {"reference": source.reference, "fingerprint": source.fingerprint, "license": source.license}
            facts = {"task": inputs.task, "labels": inputs.labels, "model": base, "precision": precision, **inputs.facts}
            facts |= {"rounding": plan.facts, "accuracy_levels": plan.accuracy_levels}
            write_manifest(staging, "merged", layers=layers, **facts)
            facts |= conclude(staging, inputs, plan.rows, force=force)
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
        "rounding": plan.facts,
        "accuracy_levels": plan.accuracy_levels,
        "trade": plan.trade,
        "notes": inputs.notes,
        "table": table(layers),
        "results": facts.get("results", []),
    }


def shippable(precision: str, inputs: Inputs) -> str:
    """Return the precision, fp32 for a model that has nothing on the grid: only linear layers and word embeddings go there."""
    layout = inputs.adapted.layout
    if precision == "fp32" or layout.linears or layout.embeddings:
        return precision
    inputs.notes.append(f"this model is convolutions, which {precision} has no layers for: it ships in fp32")
    return "fp32"


def gather(run: Path | None, adapter: Path | Recipe | None, model: str | None) -> Inputs:
    """Open what is to be merged; raises UserError if it does not fit together or a tensor is missing."""
    from edgelora.adapters.adapted import Adapted, num_labels
    from edgelora.adapters.combine import Recipe
    from edgelora.adapters.foreign import only_run, open_foreign
    from edgelora.adapters.scales import load_trained as load
    from edgelora.models.source import open_model
    from edgelora.tasks.classified import Classification
    from edgelora.tokenizer import read_config

    recipe = Recipe((adapter,)) if isinstance(adapter, Path) else adapter
    run = run or (only_run(recipe) if recipe is not None else None)
    foreign = open_foreign(recipe) if recipe is not None and run is None else None
    manifest = read_manifest(run, "run") if run is not None else {}
    reference = model or manifest.get("model", {}).get("reference") or (foreign.reference if foreign else None)
    if reference is None:
        named = "".join(f'; the adapter was trained on "{base}"' for base in (foreign.bases if foreign else []))
        raise SettingsError(
            f"nothing to merge: neither a run nor a model{named}", hint="edgelora merge --adapter DIR --model MODEL -o OUT"
        )
    source = open_model(reference)
    if run is not None:
        check_base(source, manifest, run)
    for folder, trained in (foreign.runs if foreign else {}).items():
        check_base(source, trained, folder)
    file = load(run) if run is not None else (foreign.adapter if foreign else None)
    task = manifest.get("task") or guess_adapter_task(file, source.config)
    adapted = Adapted.build(source, file, model_layout(source.config, task))
    labels = list(manifest.get("labels") or (foreign.labels if foreign else []))
    if get_task(task).has_labels:
        one_each = isinstance(get_task(task), Classification)  # an output of the head's last matrix is a label
        written = read_config(run / "config.json").get("id2label") if run is not None else None
        rows = num_labels(adapted) if one_each else len(written or labels or source.config.get("id2label") or UNNAMED)
        labels = check_labels(labels, rows, source.config)
    facts: dict[str, Any] = {key: manifest[key] for key in ("settings", "results") if key in manifest}
    tokenizer, notes = run or source.folder, []
    if foreign is not None:
        tokenizer, notes, facts = foreign.tokenizer(tokenizer), foreign.notes(reference), foreign.facts()
    return Inputs(adapted, task, labels, tokenizer, facts, manifest.get("grid", {}), notes)


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


def guess_adapter_task(adapter: AdapterFile | Combination | None, config: dict[str, Any]) -> str:
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


def write_weights(adapted: Adapted, path: Path, plan: RoundingPlan) -> dict[str, Layer]:
    """Write model.safetensors; return the manifest's `layers`, with each layer's measured error."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    shapes = {name: adapted.shape(name) for name in adapted.layout.names()}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        choice = plan.choices.get(layer) if layer != name else None
        if choice is None:
            tensors[name] = torch.float32, shape
            continue
        blocks = (shape[0], -(-shape[1] // choice.block_size))
        tensors[f"{layer}.codes"] = torch.uint8, (*blocks, choice.block_size * choice.bits // 8)
        tensors[f"{layer}.scales"] = torch.float32, blocks
    layers: dict[str, Layer] = {}
    quantizable = {*adapted.layout.embeddings, *adapted.layout.linears}
    with StreamedSafetensors(path, tensors) as file:
        for name, shape in shapes.items():
            layer = name.removesuffix(".weight")
            if layer not in quantizable or layer == name:
                file.write(name, adapted.plain(name).float())
                continue
            base, merged = adapted.weight(layer)
            weight = (base if merged is None else merged).float()
            if layer not in plan.choices:
                file.write(name, weight)
                continue
            tensor = plan.tensor(layer, weight)
            file.write(f"{layer}.codes", tensor.codes)
            file.write(f"{layer}.scales", tensor.scales)
            stored = {"bits": tensor.bits, "block_size": tensor.block_size, "shape": list(shape)}
            layers[layer] = {**stored, **measured(base, merged, tensor).figures()}
    return layers


def write_companions(inputs: Inputs, staging: Path) -> None:
    """Copy the tokenizer and write config.json."""
    import shutil

    from edgelora.adapters.adapted import merged_config
    from edgelora.tokenizer import TOKENIZER_FILES

    for name in TOKENIZER_FILES:
        if (inputs.folder / name).is_file():
            shutil.copyfile(inputs.folder / name, staging / name)
    write_json(staging / "config.json", merged_config(inputs.adapted, inputs.labels) | dict(get_task(inputs.task).config))


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
