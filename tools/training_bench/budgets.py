"""`budgets`: random budgets, and whether any run ever had more than its `--ram`.

Each run is made free, where its own peak and that of all its processes together are watched, and as root once more inside a
memory cgroup of the budget without swap, which does not forgive.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

from edgelora import console
from training_bench import cgroups, limits, models, rows
from training_bench.results import Record, Results, noted
from training_bench.runs import Bench, Ours, finetune

COUNT = 20
LOWEST_MB, HIGHEST_MB = 250, 2500
STEPS = 2


def random_budgets(count: int = COUNT, seed: int = 0) -> list[dict[str, Any]]:
    """Return `ram_mb` (small ones are as likely as large ones: the logarithm is uniform) with a batch size and a precision."""
    chance = random.Random(seed)
    return [
        {
            "ram_mb": round(LOWEST_MB * (HIGHEST_MB / LOWEST_MB) ** chance.random()),
            "batch_size": chance.choice((1, 2, 4, 8)),
            "precision": chance.choice(("int4", "int8", "fp32")),
        }
        for _ in range(count)
    ]


def measure(bench: Bench, results: Results, count: int = COUNT) -> list[Record]:
    """Try the budgets on one model; return the table's rows."""
    folder = models.folder_of(bench.model, bench.work)
    data = rows.natural(rows.read_pairs(bench.data), bench.work)
    inside = cgroups.parent() is not None
    if not inside:
        console.warn("budgets: not tried in memory cgroups, which need root")
    table = [one(bench, results, folder, data, number, drawn, inside) for number, drawn in enumerate(random_budgets(count))]
    results.part(f"budgets/{bench.model}", table)
    console.table(f"{bench.model}: random budgets, {STEPS} steps each", table)
    above = [row for row in table if row["held"] is False]
    console.facts("", {"runs above their --ram": len(above), "refused": sum(row["outcome"] == "refused" for row in table)})
    return table


def one(bench: Bench, results: Results, folder: Path, data: Path, number: int, drawn: dict[str, Any], inside: bool) -> Record:
    ask = Ours(
        "budget", folder, data, STEPS, drawn["batch_size"], drawn["ram_mb"], drawn["precision"], options={"valid-rows": 4}
    )
    key = f"budgets/{bench.model}/{number}-{drawn['ram_mb']}"
    free = results.run(f"{key}/free", lambda: finetune(bench, ask))
    row = {
        "--ram MB": drawn["ram_mb"],
        "batch": drawn["batch_size"],
        "precision": drawn["precision"],
        "outcome": free["outcome"],
        "peak MB": free["peak_rss_mb"] if free["outcome"] == "done" else None,
        "with children MB": free["peak_tree_mb"] if free["outcome"] == "done" else None,
        "anonymous MB": free["peak_anonymous_mb"] if free["outcome"] == "done" else None,
        "in a cgroup": None,
        "held": held(free, drawn["ram_mb"]),
    }
    if inside and free["outcome"] == "done":
        runner = functools.partial(limits.limited, drawn["ram_mb"])
        limited = results.run(f"{key}/cgroup", lambda: finetune(bench, ask, runner))
        row["in a cgroup"] = limited["outcome"]
        row["held"] = bool(row["held"]) and limited["outcome"] == "done"
    return noted(row, free)


def held(record: Record, ram_mb: int) -> bool | None:
    """Whether a run stayed within its budget; None for one that was refused."""
    if record["outcome"] == "refused":
        return None
    return bool(record["outcome"] == "done" and record["peak_tree_mb"] <= ram_mb)
