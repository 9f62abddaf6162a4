"""What a decoder does on a PC beside its peers, for README.md: results of tools/bench_device condensed to what the page shows.

Several results files are merged; where two have measured the same model, the later one counts. Results of two machines are
refused: their figures say nothing about each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import readme_training

HELD = ("processor", "architecture", "physical_cores")  # what all files must have in common


def condense(paths: Iterable[Path]) -> dict[str, Any]:
    """Return {"machine", "models": {model: {"measured", "rows"}}}. Raises SystemExit for files that do not go together."""
    models: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    for path in paths:
        content = readme_training.read(path)
        found = content["machine"]
        if machine and any(found.get(name) != machine.get(name) for name in HELD):
            raise SystemExit(f"error: {path} was measured on another machine than the first file; give files of one machine")
        machine = found
        for name, rows in content["parts"].items():
            part, _, model = name.partition("/")
            if part == "speed" and rows:
                models[model] = {"measured": circumstances(content["runs"], model), "rows": rows}
    if not models:
        raise SystemExit("error: no results of tools/bench_device in these files")
    return {"machine": describe(machine), "models": models}


def describe(machine: dict[str, Any]) -> str:
    isa, size = ", ".join(machine["isa"]), f"{machine['ram_mb'] / 1024:.0f} GB"
    return f"{machine['physical_cores']} cores of {machine['processor']} ({isa}), {machine['architecture']}, {size}"


def circumstances(runs: dict[str, Any], model: str) -> str:
    """Return the lengths, threads and processes of a model's runs, from the names of these."""
    found = [match for name in runs if (match := re.fullmatch(rf"{re.escape(model)}/(\d+)\+(\d+)/(\d+)/.+/(\d+)", name))]
    if not found:
        return ""
    prompt, new, threads, _ = found[-1].groups()
    processes = 1 + max(int(match[4]) for match in found)
    lengths = f"{prompt} tokens of prompt and {new} after it, {threads} threads"
    return f"{lengths}, medians of {processes} processes of each side in turn"


def tables(found: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (title, rows) of each model that was measured."""
    titles = readme_training.MODELS
    return [
        (f"{titles.get(model, model)}: {part['measured']}", [shown(row) for row in part["rows"]])
        for model, part in found["models"].items()
    ]


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with a dash for what was not measured, and whole numbers without a point."""
    whole = {key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in row.items()}
    return {key: "–" if value is None else value for key, value in whole.items()}
