"""`edgelora export --adapters static|swap`: adapters that are not merged, from the base to the manifest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edgelora.adapters import peft_format
from edgelora.errors import SettingsError
from edgelora.export.adapters import StaticBranches, SwapBranches, refuse_unbranched
from edgelora.export.work import Work
from edgelora.folder import read_manifest
from edgelora.models.tensors import decoder_layout

MODES = ("merged", "static", "swap")


def check_mode(mode: str, kind: str | None) -> None:
    """Raise SettingsError where a way to ship adapters does not go with what is exported; kind: "run", "merged" or None."""
    if mode not in MODES:
        raise SettingsError(f'adapters "{mode}" is not known; allowed: {", ".join(MODES)}')
    if mode == "static" and kind != "run":
        raise SettingsError("--adapters static keeps the adapter of a run in the graph, and this is not a run")
    if mode == "swap" and kind == "run":
        raise SettingsError(
            "--adapters swap makes a base bundle, to which runs are added; this is a run",
            hint="edgelora export MODEL --adapters swap -o BUNDLE, then edgelora export RUN --onto BUNDLE",
        )


def base_precision(run: Path) -> str:
    """Return in which precision a run's frozen weights can ship: their merged folder's, that of 4 or 8 bits, else the run's."""
    from edgelora.models.source import open_model

    manifest = read_manifest(run, "run")
    source = open_model(manifest["model"]["reference"])
    if source.merged is not None:
        return str(source.merged.manifest["precision"])
    bits = {4: "int4", 8: "int8"}.get(int(manifest["plan"]["base_bits"]))
    return bits or str(manifest["settings"]["precision"])


def base_folder(run: Path, temporary: Path, precision: str, model: str | None) -> tuple[Path, Path | None]:
    """Return the merged folder of a run's base alone, and the run: the folder that it was trained on, or one in `temporary`."""
    from edgelora.merging.merge import check_base, merge
    from edgelora.models.source import open_model

    manifest = read_manifest(run, "run")
    source = open_model(model or manifest["model"]["reference"])
    check_base(source, manifest, run)
    if source.merged is not None:
        found = source.merged.manifest.get("precision")
        if found != precision:
            raise SettingsError(f"{run} was trained on {source.reference}, which is {found}, not {precision}")
        return source.merged.folder, run
    shutil.rmtree(temporary, ignore_errors=True)
    merge(None, temporary, model=source.reference, precision=precision)
    return temporary, run


def keep_beside(work: Work, mode: str) -> None:
    """Give the graph that will be built its branches. Raises SettingsError for what has no branches."""
    if mode == "merged":
        return
    if work.spec is None:
        task = work.checkpoint.task
        raise SettingsError(f"--adapters {mode} is for text-generation; {task} ships merged", hint="leave --adapters out")
    linears = decoder_layout(work.spec).linears
    if mode == "swap":
        work.branches = SwapBranches(linears)
        return
    assert work.run is not None
    work.adapter = peft_format.load(work.run)
    refuse_unbranched(work.adapter, linears, str(work.run))
    work.branches = StaticBranches(work.adapter.factors)


def beside(work: Work) -> dict[str, Any]:
    """Return what the manifest says of adapters beside the weights.

    products: of a base bundle, by the first part of its inputs' names, the rows of each layer in that product's output.
    """
    if isinstance(work.branches, SwapBranches):
        return {"products": work.branches.products}
    if work.adapter is None or work.run is None:
        return {}
    run = read_manifest(work.run, "run")
    kept: dict[str, Any] = {key: run[key] for key in ("settings", "results") if key in run}
    rank = max(factors.rank for factors in work.adapter.factors.values())
    return {**kept, "branch": {"rank": rank, "layers": len(work.adapter.factors)}}
