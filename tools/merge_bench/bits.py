"""`bits`: every precision that training on the grid knows: held-out loss, size, and the speed of decoding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from training_bench.results import Record

from edgelora import console
from edgelora.config import FinetuneConfig
from merge_bench import e2e, verdict
from merge_bench.bench import Bench, attempt


def precisions() -> list[str]:
    """Return the precisions of `edgelora finetune` that have a grid, most bits first."""
    choices = next(field for field in dataclasses.fields(FinetuneConfig) if field.name == "precision").metadata["choices"]
    return sorted((name for name in choices if name != "fp32"), reverse=True)


def measure(bench: Bench, csv_file: Path) -> list[Record]:
    """Train, export, score and time a bundle of each precision; return the rows of the table."""
    begun = e2e.begin("bits", bench, csv_file)
    if begun is None:
        return []
    rows, reference = begun
    table: list[Record] = [
        {"what": "base, fp32", "loss": reference.base},
        {"what": "fp32 adapter", "loss": reference.adapter},
        *(attempt(precision, trial, bench, rows, precision) for precision in precisions()),
    ]
    table = verdict.with_ratios(table, reference.base, reference.adapter)
    bench.results.part(f"bits/{bench.setup}", {"table": table, "requirements": []})
    console.table(f"Bits, {bench.setup}: loss of {bench.rows} held-out rows", table)
    return table


def trial(bench: Bench, rows: e2e.Rows, precision: str) -> Record:
    row = e2e.ours(bench, rows, precision)
    bundle = bench.place(f"bundle-{precision}")
    speed = bench.verb(f"bench-{precision}", "bench", bundle, threads=bench.threads)["result"]
    return {
        **row,
        **{name.replace("_per_s", "/s"): speed.get(name) for name in ("prefill_tokens_per_s", "decode_tokens_per_s")},
    }
