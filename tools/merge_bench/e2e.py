"""`e2e`: SmolLM2 on E2E rows: our int4 bundle beside other ways to 4 bits, scored by one evaluator on the same tokens.

The others start from our fp32 run's adapter, merged by PEFT (or from the adapter of --peft-adapter). Where a tool leaves a
choice, it gets the better: heads stay in fp32 with rounding to nearest and GPTQ, GPTQ sees rows of the training set.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_bench.results import Record

from edgelora import console
from merge_bench import splits, verdict
from merge_bench.bench import Bench, StepFailed, attempt, folder_mb

BUILDER = "onnxruntime_genai.models.builder"
CALIBRATION_ROWS = 128
EVALUATOR_TOLERANCE = 1e-3  # relative: two implementations of one fp32 model, summed over thousands of targets
OURS = "EdgeLoRA int4 bundle"
RTN, GENAI, MIXED, GPTQ = (
    "PEFT merge + round to nearest",
    "PEFT merge + onnxruntime-genai builder int4",
    "the same, k_quant, 8-bit head",
    "PEFT merge + GPTQ",
)
OTHERS = [RTN, GENAI, MIXED, GPTQ]


@dataclass(frozen=True)
class Rows:
    """`data` is the folder that trainings read; held-out and calibration rows are there as text and as token ids."""

    data: Path
    test: Path
    calibration: Path
    test_ids: Path
    calibration_ids: Path

    @classmethod
    def prepare(cls, bench: Bench, csv_file: Path) -> Rows:
        data = splits.e2e(csv_file, bench.work)
        folder = bench.work / "rows"
        test = splits.first_rows(data / "test.jsonl", bench.rows, folder / f"merge-test-{bench.rows}.jsonl")
        some = splits.first_rows(data / "train.jsonl", CALIBRATION_ROWS, folder / "merge-calibration.jsonl")
        ids = [splits.write_ids(path, bench.model, path.with_suffix(".ids.jsonl")) for path in (test, some)]
        return cls(data, test, some, *ids)


@dataclass(frozen=True)
class Reference:
    """The losses that bundles are measured by, and the folder of base and adapter merged in fp32."""

    base: float
    adapter: float
    merged: Path


def measure(bench: Bench, csv_file: Path, adapter: Path | None) -> list[Record]:
    """Measure everything; return the rows of the table."""
    begun = begin("e2e", bench, csv_file, adapter)
    if begun is None:
        return []
    rows, reference = begun
    table: list[Record] = [
        {"what": "base, fp32", "loss": reference.base},
        {"what": "fp32 adapter", "loss": reference.adapter, "MB": folder_mb(reference.merged, "*.safetensors")},
        attempt(OURS, ours, bench, rows),
        *(attempt(name, way, bench, rows, reference) for name, way in WAYS.items()),
    ]
    table = verdict.with_ratios(table, reference.base, reference.adapter)
    required = verdict.losses(table, OURS, reference.adapter, OTHERS)
    bench.results.part(f"e2e/{bench.setup}", {"table": table, "requirements": required})
    console.table(f"SmolLM2, E2E rows, {bench.setup}: loss of {bench.rows} held-out rows", table)
    console.table("Required", required)
    return table


def begin(part: str, bench: Bench, csv_file: Path, adapter: Path | None = None) -> tuple[Rows, Reference] | None:
    """Return the rows of a part and what its bundles are measured by; None, and a word why, where that cannot be had."""
    rows = Rows.prepare(bench, csv_file)
    try:
        return rows, refer(bench, rows, adapter)
    except StepFailed as failure:
        console.warn(f"{part}: {failure}")
        return None


def refer(bench: Bench, rows: Rows, adapter: Path | None) -> Reference:
    """Train the fp32 adapter unless one is given, merge it with PEFT, and score it and the base."""
    name = "ours" if adapter is None else f"of-{adapter.name}"
    base = bench.score("base", "torch", bench.model, rows.test_ids)
    trained = adapter or float_run(bench, rows)
    merged = bench.place(f"peft-merged-{name}")
    bench.peer(f"peft-merged-{name}", "onnx", "merge.py", bench.model, trained, merged, out=merged)
    loss = bench.score(f"adapter-{name}", "torch", merged, rows.test_ids)
    if adapter is None:
        metrics = bench.evaluate(f"evaluate-fp32/{bench.rows}-rows", trained, rows.test, float=True)
        check_evaluator(loss, metrics["loss"])
    return Reference(base, loss, merged)


def check_evaluator(loss: float, other: float) -> None:
    """Refuse figures of an evaluator that does not give an fp32 model the loss that `edgelora evaluate` gives it."""
    if abs(loss - other) > EVALUATOR_TOLERANCE * other:
        raise SystemExit(f"error: this evaluator found a loss of {loss:.5f}, edgelora evaluate {other:.5f}, for one fp32 model")


def float_run(bench: Bench, rows: Rows) -> Path:
    return bench.finetune("run-fp32", bench.model, rows.data, precision="fp32", base_bits=32)


def ours(bench: Bench, rows: Rows, precision: str = "int4") -> Record:
    """Train on the grid that ships, export, and score the bundle."""
    run, name = bench.finetune(f"run-{precision}", bench.model, rows.data, precision=precision), f"bundle-{precision}"
    return bundle_row(bench, name, bench.export(name, run), rows)


def bundle_row(bench: Bench, name: str, bundle: Path, rows: Rows) -> Record:
    """Return loss and size of a bundle of ours."""
    model = bundle / json.loads((bundle / "edgelora.json").read_text(encoding="utf-8"))["model_file"]
    return {"loss": bench.score(name, "onnx", model, rows.test_ids), "MB": folder_mb(bundle, "*.onnx*")}


def build(bench: Bench, reference: Reference, name: str, precision: str, *extra: str) -> Path:
    """Have onnxruntime-genai's builder write the merged model; return its ONNX file."""
    label = f"{reference.merged.name}-{name}"
    out, cache = bench.place(label), bench.work / "cache"
    options = ["--extra_options", *extra] if extra else []
    bench.peer(label, "onnx", BUILDER, "-i", reference.merged, "-o", out, "-p", precision, "-e", "cpu",
               "-c", cache, *options, out=out)  # fmt: skip
    return out / "model.onnx"


def built_row(bench: Bench, rows: Rows, reference: Reference, name: str, *extra: str) -> Record:
    model = build(bench, reference, name, "int4", *extra)
    loss = bench.score(f"{reference.merged.name}-{name}", "onnx", model, rows.test_ids)
    return {"loss": loss, "MB": folder_mb(model.parent, "*.onnx*"), "by": "onnxruntime-genai"}


def genai(bench: Bench, rows: Rows, reference: Reference) -> Record:
    return built_row(bench, rows, reference, "genai-int4")


def genai_mixed(bench: Bench, rows: Rows, reference: Reference) -> Record:
    return built_row(bench, rows, reference, "genai-mixed", "algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8")


def round_to_nearest(bench: Bench, rows: Rows, reference: Reference) -> Record:
    """Let ONNX Runtime's quantizer round the fp32 graph that onnxruntime-genai's builder writes."""
    source, label = build(bench, reference, "genai-fp32", "fp32"), f"{reference.merged.name}-rtn"
    out = bench.place(label)
    record = bench.peer(label, "onnx", "rtn.py", source, out, out=out)
    loss = bench.score(label, "onnx", out / "model.onnx", rows.test_ids)
    return {"loss": loss, "MB": folder_mb(out, "*.onnx*"), "by": record["result"].get("tool")}


def gptq(bench: Bench, rows: Rows, reference: Reference) -> Record:
    label = f"{reference.merged.name}-gptq"
    out = bench.place(label)
    record = bench.peer(label, "gptq", "gptq.py", reference.merged, rows.calibration_ids, out, bench.threads, out=out)
    loss = bench.score(label, "torch", out, rows.test_ids)
    return {"loss": loss, "MB": record["result"].get("size_mb"), "by": record["result"].get("tool")}


WAYS: dict[str, Callable[[Bench, Rows, Reference], dict[str, Any]]] = {
    RTN: round_to_nearest,
    GENAI: genai,
    MIXED: genai_mixed,
    GPTQ: gptq,
}
