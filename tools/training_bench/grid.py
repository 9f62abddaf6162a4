"""`grid`: what training on the grid that ships adds to a step: rounding alone, with a calibrated start, with learned scales."""

from __future__ import annotations

from statistics import median
from typing import Any

from edgelora import console
from training_bench import models, rows
from training_bench.results import Record, Results, noted
from training_bench.runs import Bench, Ours, finetune

TOKENS, BASE_BITS = 512, 16
NOTHING = "not rounded"
WAYS: dict[str, dict[str, str]] = {  # settings of each way
    NOTHING: {},
    "rounded to int4": {"grid_start": "nearest", "grid_scales": "max"},
    "…, calibrated start": {"grid_start": "calibrated", "grid_scales": "max"},
    "…, and learned scales": {"grid_start": "calibrated", "grid_scales": "learned"},
}


def measure(bench: Bench, results: Results) -> list[Record]:
    """Measure one model's steps of one row of TOKENS tokens each way, in rounds over all ways; return the table's rows."""
    folder = models.folder_of(bench.model, bench.work)
    data = rows.of_length(rows.read_pairs(bench.data), TOKENS, folder, bench.work)
    options: dict[str, Any] = {"max-length": TOKENS, "truncate": True, "base-bits": BASE_BITS}
    found: dict[str, list[Record]] = {way: [] for way in WAYS}
    for number in range(bench.repeats):
        for way, settings in WAYS.items():
            ask = Ours("grid", folder, data, bench.steps + 1, 1, None, "int4" if settings else "fp32", None, options, settings)
            name = f"grid/{bench.model}/{bench.steps}/{way}/{number}"
            found[way].append(results.run(name, lambda ask=ask: finetune(bench, ask)))  # type: ignore[misc]
    plain = step_seconds(found[NOTHING])
    table = [row_of(way, records, plain) for way, records in found.items()]
    results.part(f"grid/{bench.model}", table)
    console.table(f"{bench.model}: steps of {TOKENS} tokens, base at {BASE_BITS} bits, no limit", table)
    return table


def step_seconds(records: list[Record]) -> float | None:
    """Return the median seconds of all steps but each run's first; None where a run has none."""
    if any(not record.get("step_seconds") for record in records):
        return None
    return median(seconds for record in records for seconds in record["step_seconds"][1:])


def row_of(way: str, records: list[Record], plain: float | None) -> Record:
    """`of a step`: what the way adds, as a share of its own step."""
    last = records[-1]
    seconds = step_seconds(records)
    row: Record = {"what": way, "outcome": "done" if seconds is not None else last["outcome"]}
    if seconds is None:
        return noted(row, last)
    return row | {
        "s/step": seconds,
        "of a step": None if plain is None else 1.0 - plain / seconds,
        "peak MB": max(record["peak_rss_mb"] for record in records),
    }
