"""The end of a merge: what was written is what was trained, and is as good; `merge` puts what is returned in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import held_out
from edgelora.folder import is_ours, read_manifest
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.digest import digest, refuse_different
from edgelora.quant.grid import QuantizedTensor
from edgelora.report import refuse_lost_gain, what_keeps_more

if TYPE_CHECKING:
    from edgelora.merging.calibration import Calibration
    from edgelora.merging.merge import Inputs


def conclude(folder: Path, inputs: Inputs, rows: Calibration | None, *, force: bool) -> dict[str, Any]:
    """Return what the manifest of the new merged `folder` adds. rows: what it was rounded with, where it comes from no run.

    digests: {path: sha256} of every layer on the grid; as_trained: those of them that the last forward pass of the run computed
    with; results: the run's table with the merged weights; run: its folder, for `export`.
    Raises ModelError where layers differ from what was trained, and unless `force` where too little of the gain is left.
    """
    manifest = read_manifest(folder, "merged")
    found = digests(MergedCheckpoint.open(folder))
    facts: dict[str, Any] = {"digests": found}
    run, grid = inputs.folder, inputs.grid
    advice = what_keeps_more(manifest["precision"], grid, calibrated=rounded_with_rows(manifest))
    if not is_ours(run) or read_manifest(run, "run", "merged", "bundle")["kind"] != "run":
        if rows is None or not rows.held_out:
            return facts
        held = held_out.HeldOut(rows.task, rows.labels, rows.processor, rows.rows, rows.held_out)
        results = held_out.foreign_rows(folder, inputs.adapted, manifest, held)
        refuse_lost_gain(results, "merged", advice, force=force)
        return {**facts, "results": results}
    trained = trained_digests(grid, manifest)
    refuse_different(found, trained)
    facts |= {"as_trained": sorted(trained), "run": str(run.resolve())}
    results = held_out.add_merged(folder, inputs.adapted, manifest, run)
    refuse_lost_gain(results, "merged", advice, force=force)
    return {**facts, "results": results}


def digests(checkpoint: MergedCheckpoint) -> dict[str, str]:
    """Return the digest of each layer that the folder has on the grid, as its file holds it."""
    tensors = {path: checkpoint.read_linear(path) for path in checkpoint.layers}
    return {path: digest(tensor) for path, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}


def trained_digests(grid: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests that bind a merge: the run's, where it ships as it was trained and not with another rounding."""
    method = (manifest.get("rounding") or {}).get("method", "trained")
    if grid.get("precision") != manifest.get("precision") or method != "trained":
        return {}
    layers = manifest["layers"]
    return {
        path: value
        for path, value in (grid.get("digests") or {}).items()
        if path not in layers or layers[path]["block_size"] == grid["block_size"]
    }


def rounded_with_rows(manifest: Mapping[str, Any]) -> bool:
    return bool((manifest.get("rounding") or {}).get("rows"))
