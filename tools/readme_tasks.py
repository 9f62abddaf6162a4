"""What every task came to, for README.md: the results of tools/bench_tasks condensed to the figures that the page shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from readme_training import describe

Row = dict[str, Any]
PART = "tasks/"  # what the benchmark calls a row's part of its file
BUSY = 0.15  # share of the processors
SCORES = ("base", "head", "adapter", "merged", "bundle")
MADE = "pretrained here"  # what the note says of a network that was trained from scratch first


def condense(paths: Iterable[Path], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"machine", "rows"} of results files; rows that none of them has measured stay as they are `known`.

    Raises SystemExit for files that are no results, or of another machine than the others or what is known.
    """
    rows = {row["name"]: row for row in known.get("rows", [])}
    machine = known.get("machine")
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"machine", "parts"} <= content.keys():
            raise SystemExit(f"error: {path} is no results file of tools/bench_tasks")
        here = describe(content["machine"])
        if machine not in (None, here):
            raise SystemExit(f"error: {path} was measured on {here}; the other rows on {machine}")
        machine = here
        rows |= {
            name.removeprefix(PART): row_of(name, part) for name, part in content["parts"].items() if name.startswith(PART)
        }
    return {"machine": machine, "rows": list(rows.values())}


def row_of(name: str, part: Row) -> Row:
    """Return a row with as many digits as its figures are worth."""
    rounded = {key: round(part[key], 3) for key in SCORES if part[key] is not None}
    small = {key: round(part[key], 1) for key in ("minutes", "peak_mb", "predicted_mb", "ms")}
    return {"name": name.removeprefix(PART), **part, **rounded, **small}


def circumstances(rows: list[Row]) -> str:
    """Return on how many threads, and what else the machine did: its minutes and milliseconds are no better than that."""
    threads, busy = sorted({row["threads"] for row in rows}), max(row["others_busy"] for row in rows)
    text = " or ".join(map(str, threads)) + (" thread" if threads == [1] else " threads")
    return text + (f", other work on up to {busy:.0%} of the processors: times are upper limits" if busy > BUSY else "")


def groups(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Return rows under a title each: those on real pretrained models, then those on networks that were trained here."""
    titles = {
        False: "**Real pretrained models** (MiniLM, SmolLM2, Whisper):",
        True: "**Small networks of other families**, trained from scratch first, on other data than the adapter's:",
    }
    found = ((title, [row for row in rows if (MADE in row["note"]) == made]) for made, title in titles.items())
    return [(title, chosen) for title, chosen in found if chosen]


def notes(rows: list[Row]) -> dict[str, list[str]]:
    """Return the rows' notes with the names of the rows that each is about."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            found.setdefault(row["note"], []).append(row["name"])
    return found


def tables(rows: list[Row]) -> list[list[Row]]:
    """Return two tables: what it is worth, and what it took."""
    worth = [
        {
            "row": f"`{row['name']}`",
            "task": row["task"],
            "model": row["model"],
            "data": row["data"],
            "metric": row["metric"],
            **{
                name: number(row[key])
                for name, key in zip(("base", "head only", "adapter", "merged", "bundle"), SCORES, strict=True)
            },
        }
        for row in rows
    ]
    took = [
        {
            "row": f"`{row['name']}`",
            "rows, training": row["rows"],
            "held out": row["test_rows"],
            "trained parameters": f"{row['trained']:,}",
            "minutes": row["minutes"],
            "peak RAM, MB": round(row["peak_mb"]),
            "predicted": round(row["predicted_mb"]),
            "ships as": row["precision"],
            "bundle, MB": row["bundle_mb"],
            "ms an input": f"{row['ms']} a token" if row["unit"] == "token" else row["ms"],
        }
        for row in rows
    ]
    return [worth, took]


def number(value: float | None) -> float | str:
    return "–" if value is None else value
