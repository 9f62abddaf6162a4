"""The last two rows of a run's table: the merged weights in torch, and the bundle, on the rows that scored the adapter."""

from __future__ import annotations

import functools
from typing import Any

from edgelora.data.prepare import Prepared
from edgelora.export.work import Work
from edgelora.models.predictor import TorchPredictor
from edgelora.run.model import load
from edgelora.run.predictor import OnnxPredictor
from edgelora.tasks import get_task
from edgelora.tasks.base import Predictor
from edgelora.train.finetune import sample

TABLE_ROWS = 64


def add_results(work: Work) -> None:
    """Score a run's validation rows and add "merged" and "onnx" to the manifest's results; nothing without a run.

    Only the bundle generates answers, which takes torch a minute more: `verify` has shown that both are one model.
    """
    if work.run is None:
        return
    checkpoint, results = work.checkpoint, work.manifest["results"]
    task = get_task(checkpoint.task)
    prepared = Prepared.open(work.run / "data")
    limit = min(int(checkpoint.manifest.get("settings", {}).get("valid_rows") or TABLE_ROWS), TABLE_ROWS)
    examples, rows = sample(prepared.store("valid"), prepared.texts("valid"), limit)
    collate = functools.partial(task.collate, pad_token_id=work.tokenizer.pad_token_id or 0)
    predictors: dict[str, Predictor] = {
        "merged": TorchPredictor(work.network, collate),
        "onnx": OnnxPredictor(load(work.staging)),
    }
    generated = any("exact_match" in row for row in results)
    found: list[dict[str, Any]] = []
    for what, predictor in predictors.items():
        generate = generated and what == "onnx"
        metrics = task.evaluate(predictor, rows, examples, work.tokenizer, checkpoint.labels, generate=generate)
        found.append({"what": what, **metrics})
    work.manifest["results"] = [row for row in results if row.get("what") not in predictors] + found
