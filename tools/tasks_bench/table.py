"""The table, from one or several files of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training_bench.results import Record

from tasks_bench.rows import ENTRIES

PART = "tasks/"
DIGITS = {"loss": 3}  # of a metric that is no share of 1


def collected(paths: list[Path]) -> dict[str, Record]:
    """Return the rows of files by name, those of later files before those of earlier ones, in the order of the entries."""
    found: dict[str, Record] = {}
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = content.get("parts", {}) if isinstance(content, dict) else {}
        found |= {name.removeprefix(PART): part for name, part in parts.items() if name.startswith(PART)}
    order = [entry.name for entry in ENTRIES]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def shown(row: Record) -> dict[str, Any]:
    """Return a row as people read it."""
    scores = {name: number(row[name]) for name in ("base", "head", "adapter", "merged", "bundle")}
    return {
        "task": row["task"],
        "model": row["model"],
        "data": row["data"],
        "rows": f"{row['rows']:,} + {row['test_rows']:,}",
        "trained": f"{row['trained'] / 1e6:.2f} M",
        "min": f"{row['minutes']:.1f}",
        "peak MB": f"{row['peak_mb']:.0f} ({row['predicted_mb']:.0f})",
        "metric": row["metric"],
        "base": scores["base"],
        "head only": scores["head"],
        "adapter": scores["adapter"],
        "merged": scores["merged"],
        "bundle": scores["bundle"],
        "ships": f"{row['precision']}, {row['bundle_mb']:g} MB",
        "ms": f"{row['ms']:.1f}" + (" a token" if row["unit"] == "token" else ""),
        "note": row["note"],
    }


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
