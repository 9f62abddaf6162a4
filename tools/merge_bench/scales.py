"""`scales`: training the block scales alone: its memory, its loss, the size of its delta, and the delta on a base bundle.

`python -m merge_bench.scales BUNDLE BASE NAME rows.ids.jsonl` compares the logits of a bundle with those of a base bundle with
its adapter NAME, and prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from training_bench.processes import python
from training_bench.results import Record

from edgelora import console
from merge_bench import e2e, score, verdict
from merge_bench.bench import Bench, attempt, folder_mb

COMPARED_ROWS = 16
NAME = "scales"  # of the adapter on the base bundle
SCALES, DELTA = "EdgeLoRA scales-only, int4 bundle", "base bundle + delta"


def measure(bench: Bench, csv_file: Path) -> list[Record]:
    """Train the scales; return the rows of the table, beside the adapters of fp32 and int4."""
    begun = e2e.begin("scales", bench, csv_file)
    if begun is None:
        return []
    rows, reference = begun
    table: list[Record] = [
        {"what": "base, fp32", "loss": reference.base},
        {"what": "fp32 adapter", "loss": reference.adapter, "training MB": peak(bench, "run-fp32")},
        attempt(e2e.OURS, adapters, bench, rows),
        attempt(SCALES, trained, bench, rows),
        attempt(DELTA, on_base, bench, rows),
    ]
    same = table[-1].pop("same logits", None)
    table = verdict.with_ratios(table, reference.base, reference.adapter)
    text = "" if same is None else f"largest difference {same['largest difference']:.3g} at {same['positions']:,} positions"
    required = [
        verdict.requirement(f"{DELTA}: the exported bundle's logits", None if same is None else same["equal"], text),
    ]
    bench.results.part(f"scales/{bench.setup}", {"table": table, "requirements": required})
    console.table(f"Scales only, {bench.setup}: loss of {bench.rows} held-out rows", table)
    console.table("Required", required)
    return table


def peak(bench: Bench, name: str) -> float | None:
    """Return the peak resident memory of a training in MB."""
    found: float | None = bench.record(name).get("peak_rss_mb")
    return found


def adapters(bench: Bench, rows: e2e.Rows) -> Record:
    return {**e2e.ours(bench, rows), "training MB": peak(bench, "run-int4")}


def run_of(bench: Bench, rows: e2e.Rows) -> Path:
    return bench.finetune("run-scales", bench.model, rows.data, precision="int4", method="scales")


def trained(bench: Bench, rows: e2e.Rows) -> Record:
    bundle = bench.export("bundle-scales", run_of(bench, rows))
    return {**e2e.bundle_row(bench, "bundle-scales", bundle, rows), "training MB": peak(bench, "run-scales")}


def on_base(bench: Bench, rows: e2e.Rows) -> Record:
    """Put the delta on a base bundle; return its size and whether logits are those of the exported bundle."""
    run, exported = run_of(bench, rows), bench.export("bundle-scales", run_of(bench, rows))
    base, out = bench.export("bundle-base", bench.model, precision="int4"), bench.place("bundle-base-delta")
    bench.verb("bundle-base-delta", "export", run, onto=base, name=NAME, force=True, out=out)
    delta = folder_mb(out / "adapters")
    command = python("-m", __spec__.name, str(exported), str(out), NAME, str(rows.test_ids))
    found = bench.step(f"same-logits/{bench.rows}-rows", lambda: command)["result"]
    return {"loss": found["loss"], "MB": folder_mb(base, "*.onnx*"), "delta MB": delta, "same logits": found}


def compare(bundle: Path, base: Path, name: str, ids: Path) -> Record:
    """Return whether two bundles have equal logits at every position of the first rows, and the loss of the second."""
    from edgelora.run.model import load

    decoders = [load(bundle).generator.decoder, load(base, adapter=name).generator.decoder]
    largest, positions, total, tokens = 0.0, 0, 0.0, 0
    for number, row in enumerate(score.read_rows(ids)):
        logits = []
        for decoder in decoders if number < COMPARED_ROWS else decoders[1:]:
            decoder.rewind(0)
            pieces = range(0, len(row["ids"]), decoder.score_limit)
            logits.append(np.concatenate([decoder.score(row["ids"][at : at + decoder.score_limit]).copy() for at in pieces]))
        if len(logits) == 2:
            largest = max(largest, float(np.abs(logits[0] - logits[1]).max()))
            positions += len(row["ids"])
        loss, targets = score.row_loss(logits[-1], row["ids"], row["supervised"])
        total, tokens = total + loss, tokens + targets
    return {"equal": largest == 0, "largest difference": largest, "positions": positions, "loss": total / tokens}


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))))
