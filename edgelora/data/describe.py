"""What `edgelora data` shows: the task, columns, splits, lengths, labels, and the first rows as the model sees them."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora import console
from edgelora.config import FinetuneConfig
from edgelora.data.check import scan
from edgelora.data.prepare import prepare
from edgelora.tasks import get_task

FIRST_ROWS = 3
BINS = 8
MOST_LABELS = 100  # in the table; --json has all
BAR = 40  # characters of the longest bar


def describe(data: str, processor_folder: Path | None, config: FinetuneConfig, *, max_length: int = 1024) -> dict[str, Any]:
    """Return what was read from DATA, refused as `finetune` would refuse it.

    With a model's folder, lengths are in the task's unit (tokens) and rows are shown as rich markup with what is trained
    between ⟦ and ⟧; without one, lengths are characters and rows are as read. `max_length` counts where the settings have none.
    """
    if processor_folder is None:
        return describe_text(data, config)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        prepared = prepare(data, processor_folder, Path(folder) / "rows", config, max_length=config.max_length or max_length)
        task = get_task(prepared.task)
        processor = task.open_processor(processor_folder)
        lengths = np.concatenate([prepared.store(split).lengths for split in prepared.rows])
        first = [task.show(example, processor, prepared.labels) for example in prepared.store("train")[:FIRST_ROWS]]
    splits = {
        name: {"rows": rows, task.unit: prepared.tokens[name], "trained": prepared.supervised[name]}
        for name, rows in prepared.rows.items()
    }
    return {
        "data": data,
        "task": prepared.task,
        "columns": prepared.columns,
        "splits": splits,
        "lengths": {"unit": task.unit, **summarize(lengths), "limit": prepared.max_length, "truncated": prepared.truncated},
        "labels": prepared.label_counts,
        "first_rows": first,
    }


def describe_text(data: str, config: FinetuneConfig) -> dict[str, Any]:
    from rich.markup import escape

    found = scan(data, task=config.task, columns=config.columns, valid=config.valid)
    found.problems.refuse(data)
    splits = {name: {"rows": len(hashes)} for name, hashes in found.hashes.items()}
    if found.valid:
        held_out = sum(value in found.valid for value in found.hashes["train"])
        splits["train"]["rows"] -= held_out
        splits["valid"] = {"rows": held_out}
    lengths: list[int] = []
    first: list[str] = []
    for split in found.files:
        for _, _, row in found.rows(split):
            text = json.dumps(row, ensure_ascii=False)
            lengths.append(sum(map(len, row.values())) if all(isinstance(v, str) for v in row.values()) else len(text))
            if len(first) < FIRST_ROWS:
                first.append(escape(text))
    return {
        "data": data,
        "task": found.task.name,
        "columns": found.found_columns,
        "splits": splits,
        "lengths": {"unit": "characters", **summarize(np.array(lengths))},
        "labels": {split: dict(counts) for split, counts in found.label_counts.items()},
        "first_rows": first,
    }


def summarize(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Return min, median, 95th percentile, max and a histogram [{"from", "to", "rows"}] of lengths [N]."""
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.linspace(low, high + 1, min(BINS, high - low + 1) + 1).round().astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    bins = [{"from": int(a), "to": int(b) - 1, "rows": int(n)} for (a, b), n in zip(pairwise(edges), counts, strict=True)]
    percentiles = {"median": int(np.median(lengths)), "p95": int(np.percentile(lengths, 95))}
    return {"min": low, **percentiles, "max": high, "histogram": bins}


def render(result: dict[str, Any]) -> None:
    """Show what `describe` returned to people."""
    console.facts(result["data"], {"task": result["task"], "columns": ", ".join(result["columns"])})
    console.table("splits", [{"split": name, **counts} for name, counts in result["splits"].items()])
    lengths = result["lengths"]
    console.table(f"length in {lengths['unit']}", [{name: lengths[name] for name in ("min", "median", "p95", "max")}])
    most = max(entry["rows"] for entry in lengths["histogram"])
    for entry in lengths["histogram"]:
        bar = "█" * -(-entry["rows"] * BAR // most)
        console.markup(f"{entry['from']:>7} – {entry['to']:<7}{bar} {entry['rows']}")
    if result["labels"]:
        train, *others = result["labels"].items()
        rows = [
            {"label": label, train[0]: count, **{name: counts.get(label, 0) for name, counts in others}}
            for label, count in sorted(train[1].items(), key=lambda item: -item[1])
        ]
        console.table("labels", rows[:MOST_LABELS])
        if len(rows) > MOST_LABELS:
            console.markup(f"and {len(rows) - MOST_LABELS:,} more labels")
    trained = " as the model sees them, ⟦what is trained⟧" if lengths["unit"] != "characters" else ""
    console.markup(f"first rows{trained}:")
    for text in result["first_rows"]:
        console.markup(text)


def plain(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result without colours, for --json."""
    from rich.text import Text

    return {**result, "first_rows": [Text.from_markup(text).plain for text in result["first_rows"]]}
