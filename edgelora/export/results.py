"""The last row of the table: the bundle in ONNX Runtime, on the held-out rows of the run that it comes from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from edgelora import console, held_out
from edgelora.errors import EdgeLoRAError
from edgelora.export.work import Work
from edgelora.folder import MANIFEST, read_manifest
from edgelora.held_out import HeldOut
from edgelora.merging.shipped import rounded_with_rows
from edgelora.models.agreement import Reference
from edgelora.models.source import open_model
from edgelora.report import gain, line, refuse_lost_gain, what_keeps_more, with_kept
from edgelora.run.model import load
from edgelora.run.predictor import OnnxPredictor
from edgelora.tasks.base import Task


def add_results(work: Work, *, force: bool) -> None:
    """Score the bundle and add "onnx" to the manifest's results; a bundle that comes from no run has none.

    Raises ModelError where too little of the adapter's gain is left, unless `force` is given. Only the bundle generates
    answers, which takes torch a minute more: `verify` has shown that both are one model.
    """
    run, results = work.run, [row for row in work.manifest["results"] if row.get("what") != "onnx"]
    if run is None or gain(results) is None:
        return
    if not (run / MANIFEST).is_file():
        console.say(f"{run} is gone, and its held-out rows with it: the bundle is not scored")
        return
    held = held_out_of(work)
    if held is None:
        return
    predictor = OnnxPredictor(load(work.staging, native=False))
    # of another vocabulary: logits of fewer tokens than the fp32 adapter's
    reference = None if "vocabulary" in work.manifest else reference_of(work, run, held.task)
    generate = any(held.task.written_metric in row for row in results)
    metrics = held.score_bundle(predictor, reference, generate=generate)
    results = with_kept([*results, line("onnx", metrics, precision=work.precision)])
    work.manifest["results"] = results
    merged = work.checkpoint.manifest
    grid = read_manifest(run, "run").get("grid") or {}
    advice = what_keeps_more(work.precision, grid, calibrated=rounded_with_rows(merged))
    refuse_lost_gain(results, "onnx", advice, force=force)


def held_out_of(work: Work) -> HeldOut | None:
    """Return the held-out rows of the run in the tokens that ship; None where there is no run, or it has none."""
    if work.run is None or not (work.run / MANIFEST).is_file():
        return None
    held = held_out.held_out(work.run, read_manifest(work.run, "run"))
    return encoded_anew(held, work.processor) if held is not None and "vocabulary" in work.manifest else held


def encoded_anew(held: HeldOut, processor: Any) -> HeldOut:
    """Return the held-out rows in the ids of another tokenizer; a row that was cut is cut where it was."""
    task = held.task
    examples = [task.encode(row, processor, held.labels) for row in held.rows]
    cut = [
        new if len(new) <= len(old) else task.truncate(new, len(old)) for new, old in zip(examples, held.examples, strict=True)
    ]
    return dataclasses.replace(held, processor=processor, examples=cut)


def reference_of(work: Work, run: Path, task: Task) -> Reference | None:
    """Return what the fp32 adapter says of the rows; None, and a word about it, where its base model is not there any more."""
    model: dict[str, Any] = work.checkpoint.manifest["model"]
    try:
        source = open_model(str(model["reference"]))
    except EdgeLoRAError:
        console.say(f"{model['reference']} is gone: the bundle is not compared with the unrounded adapter")
        return None
    return held_out.load_reference(run, source, task)
