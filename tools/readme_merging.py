"""What 4 bits keep of an adapter, for README.md: the results of tools/bench_merge condensed to the tables that the page shows.

Several results files of one machine are merged. A part is shown with the settings of the last file that has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import readme_training

Row = dict[str, Any]
# What stands above each table; SETUP and ROWS are filled in.
TITLES = {
    "e2e": "**Beside other tools' 4 bits.** SmolLM2-135M, E2E rows, SETUP; loss of ROWS held-out rows, as ONNX "
    "Runtime computes each bundle:",
    "banking": "**A classifier.** MiniLM, Banking77, SETUP; accuracy on rows that no training has seen:",
    "peft": "**An adapter that PEFT trained.** SmolLM2-135M, E2E rows, SETUP; merged into int4 by `edgelora merge "
    "--adapter`; loss of ROWS held-out rows:",
    "scales": "**Block scales alone.** SmolLM2-135M, E2E rows, SETUP; `--method scales`, and its delta on a base "
    "bundle; loss of ROWS held-out rows:",
    "bits": "**Fewer bits.** SmolLM2-135M, E2E rows, SETUP; every precision that training on the grid knows; loss of ROWS "
    "held-out rows:",
}  # fmt: skip
DIGITS = {
    "loss": 4,
    "accuracy": 4,
    "macro_f1": 4,
    "points": 2,
    "above fp32, %": 2,
    "delta MB": 1,
    "training MB": 0,
}  # others: 1
HIDDEN = ("macro_f1", "by")


def condense(paths: Iterable[Path]) -> dict[str, Any]:
    """Return {"machine", "parts": title and rows of each, "required"} of results files.

    Raises SystemExit for files that are no results or of different machines.
    """
    found = [readme_training.read(path) for path in paths]
    machines = {readme_training.describe(content["machine"]) for content in found}
    if len(machines) > 1:
        raise SystemExit(f"error: results of different machines: {'; '.join(sorted(machines))}")
    parts: dict[str, Row] = {}
    for content in found:
        for key, part in content["parts"].items():
            name, _, setup = key.partition("/")
            if name in TITLES:
                title = TITLES[name].replace("SETUP", setup.replace("-", " ")).replace("ROWS", held_out(content["runs"], setup))
                parts[name] = {
                    "title": title,
                    "rows": [rounded(row) for row in part["table"]],
                    "required": part["requirements"],
                }
    shown = [parts[name] for name in TITLES if name in parts]
    required = [row for part in shown for row in part.pop("required")]
    return {"machine": machines.pop(), "parts": shown, "required": required}


def held_out(runs: dict[str, Row], setup: str) -> str:
    """Return how many rows were scored, from the names of the runs."""
    counts = [name[1] for key in runs if (name := re.fullmatch(rf"{re.escape(setup)}/base/(\d+)-rows", key))]
    return max(counts, key=int, default="the")


def rounded(row: Row) -> Row:
    return {
        name: readme_training.number(value, DIGITS.get(name, 1)) if isinstance(value, float) else value
        for name, value in row.items()
        if name not in HIDDEN
    }


def tables(content: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """Return title and rows of each table, with a dash where a row has no figure."""
    found = []
    for part in content["parts"]:
        names = list(dict.fromkeys(name for row in part["rows"] for name in row))
        found.append(
            (part["title"], [{name: row[name] if row.get(name) is not None else "–" for name in names} for row in part["rows"]])
        )
    return [*found, ("**What was asked of these:**", content["required"])] if content["required"] else found
