"""Put a scales delta into a base bundle for good: a bundle of the task alone, for loaders that know no adapters.

`edgelora export RUN --onto BUNDLE` keeps base and delta apart; here the base's scales are replaced in the file, its codes stay.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgelora.bundle import open_bundle
from edgelora.errors import FolderError
from edgelora.export.graph import save
from edgelora.export.onto import graph_layers
from edgelora.folder import new_folder, write_manifest
from edgelora.scales_delta import Delta, codes_digest, read_delta

HEAD = ("format", "kind", "tool_version", "complete", "files")  # of a manifest, written anew


def apply(bundle: Path, delta: Path, out: Path, *, overwrite: bool = False) -> None:
    """Write the bundle `out`: `bundle` with the scales of `delta` (a file, or the run that has it), bit for bit.

    Raises FolderError where the delta was trained with other codes than the bundle has.
    """
    opened, trained = open_bundle(bundle), read_delta(delta)
    layers = graph_layers(opened)
    digests = {path: codes_digest(layer.codes.numpy(), layer.bits, layer.block_size) for path, layer in layers.items()}
    trained.refuse_other(digests, str(bundle))
    model = ir.load(opened.model_path)
    nodes = {node.name: node for node in model.graph}
    for name, facts in opened.manifest["nodes"].items():
        replace_scales(nodes[name].inputs[2], facts["rows"], trained)
    for name, array in trained.tensors.items():
        replace_tensor(model.graph.initializers.get(name), array, f"{bundle} has no {name} of shape {list(array.shape)}")
    with new_folder(out, overwrite=overwrite) as staging:
        weights = opened.model_path.relative_to(opened.folder)
        skipped = shutil.ignore_patterns(f"{weights.name}*")
        shutil.copytree(bundle, staging, dirs_exist_ok=True, ignore=skipped)
        save(model, staging / weights)
        facts = {key: value for key, value in opened.manifest.items() if key not in HEAD}
        # What the base was measured to do is not what this one does.
        origin = {"base": trained.base, "layers": len(trained.scales)}
        write_manifest(staging, "bundle", **{**facts, "results": [], "delta": origin})


def replace_scales(value: ir.Value | None, rows: dict[str, list[int]], delta: Delta) -> None:
    """Write a node's trained scales over those of its layers, which lie one after the other."""
    if not set(rows) & set(delta.scales):
        return
    assert value is not None
    assert value.const_value is not None
    whole = np.array(value.const_value.numpy())
    for path, (start, stop) in rows.items():
        if path in delta.scales:
            whole[start:stop] = delta.scales[path]
    value.const_value = ir.tensor(whole, name=value.name)


def replace_tensor(value: ir.Value | None, array: np.ndarray[tuple[int, ...], np.dtype[np.float32]], problem: str) -> None:
    if value is None or value.const_value is None or tuple(value.const_value.shape.numpy()) != array.shape:
        raise FolderError(problem, hint="export the run itself: its head has other labels than the bundle's")
    value.const_value = ir.tensor(array, name=value.name)
