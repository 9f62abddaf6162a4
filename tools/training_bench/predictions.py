"""`plan`: what `edgelora plan` predicts against what `edgelora finetune` takes, back to back.

Models × lengths × bits × batch, at least twelve of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora import console
from training_bench import models, rows
from training_bench.processes import Measured, python, run
from training_bench.results import Record, Results, noted
from training_bench.runs import Bench, Ours, finetune

STEPS = 8
PEAK_TOLERANCE, TIME_TOLERANCE = 0.05, 0.15


@dataclass(frozen=True)
class Setting:
    """`length` 0: E2E's own rows; `bits` None: the planner's choice; `ram_mb` None: no budget."""

    length: int
    bits: int | None
    batch: int
    ram_mb: int | None = None

    def __str__(self) -> str:
        length = f"{self.length} tokens" if self.length else "E2E rows"
        bits = f"{self.bits} bits" if self.bits else "bits free"
        return f"{length}, {bits}, batch {self.batch}" + (f", --ram {self.ram_mb}MB" if self.ram_mb else "")


GRID = {
    "smollm2": (
        Setting(128, 32, 8), Setting(128, 16, 4), Setting(128, 8, 8), Setting(128, 4, 8), Setting(256, 32, 1),
        Setting(256, 8, 4), Setting(256, 4, 1), Setting(512, 16, 1), Setting(512, 4, 2), Setting(1024, 8, 1),
        Setting(0, None, 8), Setting(0, None, 8, 570), Setting(0, 4, 8, 1140),
    ),
    "qwen-0.5b": (Setting(128, 4, 4), Setting(256, 8, 1), Setting(256, 4, 2), Setting(512, 4, 1), Setting(0, None, 8, 1500)),
    "qwen-1.5b": (Setting(128, 8, 1), Setting(256, 4, 1)),
    "qwen-7b": (Setting(256, 4, 1),),
}  # fmt: skip


def measure(bench: Bench, results: Results) -> list[Record]:
    """Measure one model's settings in rounds over all of them; return their rows."""
    folder = models.folder_of(bench.model, bench.work)
    pairs = rows.read_pairs(bench.data)
    found: dict[Setting, list[Record]] = {setting: [] for setting in GRID[bench.model]}
    for number in range(bench.repeats):
        for setting, records in found.items():
            name = f"plan/{bench.model}/{setting}, round {number + 1}"
            records.append(results.run(name, lambda setting=setting: back_to_back(bench, folder, pairs, setting)))  # type: ignore[misc]
    table = [row_of(f"{bench.model}, {setting}", records) for setting, records in found.items()]
    results.part(f"plan/{bench.model}", table)
    return table


def back_to_back(bench: Bench, folder: Path, pairs: list[rows.Pair], setting: Setting) -> Record:
    """Predict, then run at once; the record is the run's, with `predicted` beside."""
    ask = asked(bench, folder, pairs, setting)
    told = predict(bench, ask)
    record = finetune(bench, ask)
    if told.done:
        kept = ("peak_mb", "seconds", "settings", "parts", "budget_mb")
        record["predicted"] = {key: told.result.get(key) for key in kept}
    elif record["outcome"] == "done":
        record |= {"outcome": "failed", "message": f"plan {told.outcome}, finetune did not: {told.message}"}
    return record


def asked(bench: Bench, folder: Path, pairs: list[rows.Pair], setting: Setting) -> Ours:
    options: dict[str, Any] = {} if setting.bits is None else {"base-bits": setting.bits}
    data = rows.natural(pairs, bench.work)
    if setting.length:
        data = rows.of_length(pairs, setting.length, folder, bench.work)
        options |= {"max-length": setting.length, "truncate": True}
    return Ours("plan", folder, data, STEPS, setting.batch, setting.ram_mb, options={**options, "valid-rows": 4})


def predict(bench: Bench, ask: Ours) -> Measured:
    command = python("-m", "edgelora", "plan", *ask.arguments(bench), "--json", "--quiet")
    return run(command, environment=bench.environment)


def row_of(what: str, records: list[Record]) -> Record:
    """Return predicted and measured peak of the round that was furthest off, and the median round's seconds of all steps.

    A machine that others share is slower and faster by more than the bound from one minute to the next, in a round's
    prediction as in its run; memory is the same.
    """
    rounds = [record for record in records if record["outcome"] == "done" and record.get("predicted")]
    row: Record = {"what": what, "outcome": "done" if len(rounds) == len(records) else records[-1]["outcome"]}
    if len(rounds) < len(records):
        return noted(row, next(record for record in records if record not in rounds))
    peaks = [(record["peak_rss_mb"], record["predicted"]["peak_mb"]) for record in rounds]
    seconds = [(sum(record["step_seconds"]), record["predicted"]["seconds"]) for record in rounds]
    peak, told = max(peaks, key=lambda pair: abs(pair[0] / pair[1] - 1))
    ordered = sorted(seconds, key=lambda pair: pair[0] / pair[1])
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]  # two of an even number: the worse of them
    taken, said = max(middle, key=lambda pair: abs(pair[0] / pair[1] - 1))
    return row | {
        "peak MB": peak,
        "predicted": told,
        "ratio": peak / told,
        "s of steps": taken,
        "s predicted": said,
        "s ratio": taken / said,
        "others busy": max(record["others_busy"] for record in rounds),
    }


def conclude(table: list[Record], results: Results) -> Record:
    """Show all settings and the worst of each prediction; return the worst."""
    console.table(
        f"plan against finetune, {STEPS} steps each, the worst peak and the median time of the rounds; "
        f"allowed: peak ±{PEAK_TOLERANCE:.0%}, time ±{TIME_TOLERANCE:.0%}",
        table,
    )
    worst = {"settings": len(table), "peak, %": worst_of(table, "ratio"), "time, %": worst_of(table, "s ratio")}
    results.part("plan/worst", worst)
    console.table("The worst prediction, measured / predicted − 1", [worst])
    return worst


def worst_of(table: list[Record], name: str) -> float | None:
    """Return the ratio that is furthest from 1, in per cent above it."""
    ratios = [row[name] for row in table if row.get(name)]
    return 100 * (max(ratios, key=lambda ratio: abs(ratio - 1)) - 1) if ratios else None
