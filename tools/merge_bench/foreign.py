"""`peft`: an adapter that PEFT trained on the rows of our fp32 run, merged into 4 bits by us with calibrated rounding."""

from __future__ import annotations

from pathlib import Path

from training_bench import rows as training_rows
from training_bench.processes import ROOT, python
from training_bench.results import Record
from training_bench.runs import LEARNING_RATE

from edgelora import console
from merge_bench import e2e, verdict
from merge_bench.bench import Bench, StepFailed, attempt

NEAREST, CALIBRATED = "EdgeLoRA merge, rounded to nearest", "EdgeLoRA merge, calibrated"


def measure(bench: Bench, csv_file: Path, adapter: Path | None) -> list[Record]:
    """Train the adapter unless one is given; return the rows of the table."""
    rows = e2e.Rows.prepare(bench, csv_file)
    try:
        given = adapter or train(bench, rows)
        reference = e2e.refer(bench, rows, given)
    except StepFailed as failure:
        console.warn(f"peft: {failure}")
        return []
    table: list[Record] = [
        {"what": "base, fp32", "loss": reference.base},
        {"what": "PEFT's adapter, fp32", "loss": reference.adapter},
        attempt(NEAREST, merged, bench, rows, given, "nearest", None),
        attempt(CALIBRATED, merged, bench, rows, given, "calibrated", rows.calibration),
    ]
    table = verdict.with_ratios(table, reference.base, reference.adapter)
    required = [verdict.kept(CALIBRATED, table[-1].get("loss"), reference.base, reference.adapter)]
    bench.results.part(f"peft/{bench.setup}", {"table": table, "requirements": required})
    console.table(f"An adapter of PEFT, {bench.setup}: loss of {bench.rows} held-out rows", table)
    console.table("Required", required)
    return table


def train(bench: Bench, rows: e2e.Rows) -> Path:
    """Train with tools/peft_baseline.py on our fp32 run's rows in their order; return the adapter's folder."""
    run, out = e2e.float_run(bench, rows), bench.place("peft-adapter")

    def command() -> list[str]:
        steps = bench.place("peft-steps.jsonl")
        training_rows.write_steps(steps, run, training_rows.step_rows(run))
        return python(
            str(ROOT / "tools" / "peft_baseline.py"), str(bench.model), "--rows", str(steps), "--steps", str(bench.steps),
            "--learning-rate", str(LEARNING_RATE), "--threads", str(bench.threads), "--no-checkpointing", "--save", str(out),
        )  # fmt: skip

    bench.step("peft-adapter", command, out)
    return out


def merged(bench: Bench, rows: e2e.Rows, adapter: Path, name: str, calibration: Path | None) -> Record:
    """Merge an adapter of PEFT's into 4 bits, export it and score the bundle."""
    label = f"foreign-{adapter.name}-{name}"
    out = bench.place(label)
    bench.verb(label, "merge", adapter=adapter, model=bench.model, calibrate=calibration, precision="int4", force=True, out=out)
    return e2e.bundle_row(bench, f"{label}-bundle", bench.export(f"{label}-bundle", out), rows)
