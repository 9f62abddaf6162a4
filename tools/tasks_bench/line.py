"""One row through the line, each command in a process of its own as a user would type it; every result is kept at once."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_bench.processes import python, run
from training_bench.results import Record, Results

from tasks_bench.entry import Entry, Places, Prepared

HEAD_ALONE = {"target-modules": "none"}


class Failed(Exception):
    """A command ended with an error."""


@dataclass(frozen=True)
class Line:
    """The commands of one entry: their folders are in `places.work`, their records in `results`."""

    entry: Entry
    places: Places
    results: Results
    prepared: Prepared
    threads: int

    def folder(self, name: str) -> Path:
        return self.places.work / "runs" / self.entry.name / name

    def command(self, step: str, verb: str, *arguments: object, out: str = "") -> Record:
        """Return the record of `edgelora VERB …`, made now unless it is kept and its folder is there. Raises Failed."""
        name = f"{self.entry.name}/{step}"
        if out and not self.folder(out).is_dir():
            self.results.content["runs"].pop(name, None)
        made = ["-o", str(self.folder(out))] if out else []

        def measure() -> Record:
            if out:
                shutil.rmtree(self.folder(out), ignore_errors=True)
                self.folder(out).parent.mkdir(parents=True, exist_ok=True)
            return run(python("-m", "edgelora", verb, *map(str, arguments), *made, "--json", "--quiet")).record()

        record = self.results.run(name, measure)
        if record["outcome"] != "done":
            raise Failed(f"edgelora {verb}: {record['message']}")
        return record

    def finetune(self, step: str, **more: Any) -> Record:
        entry, given = self.entry, self.prepared
        columns = {"columns": given.columns} if given.columns else {}
        options = {"task": entry.task, "threads": self.threads, **columns, **entry.options, **more}
        return self.command(step, "finetune", given.model, given.data, *flags(options), out=step)

    def score(self, step: str, target: str | Path) -> float:
        """Return the entry's metric of a target on the held-out rows."""
        entry, given = self.entry, self.prepared
        options: dict[str, Any] = {"threads": self.threads}
        options |= {"columns": given.columns} if given.columns else {}
        options |= {"rows": entry.rows} if entry.rows else {}
        options |= {} if entry.generate else {"no-generate": True}
        options |= {"task": entry.task} if target in (given.model, given.base) else {}
        record = self.command(step, "evaluate", target, given.test, *flags(options))
        return float(record["result"]["metrics"][entry.metric])


def flags(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def measure(entry: Entry, places: Places, results: Results, threads: int, keep: Callable[[Record], None]) -> None:
    """Give `keep` the row of the table: without the head alone, which comes last, then with it.

    Raises Missing for data that is not here, Failed for a command that fails.
    """
    line = Line(entry, places, results, entry.prepare(places), threads)
    trained = line.finetune("run")
    figures = trained["result"]
    in_table = of_table(figures["table"], "base", entry.metric)
    base = in_table if entry.has_head else line.score("evaluate-base", line.prepared.base or line.prepared.model)
    adapter = line.score("evaluate-run", line.folder("run"))
    line.command("merge", "merge", line.folder("run"), out="merged")
    merged = line.score("evaluate-merged", line.folder("merged"))
    exported = line.command("export", "export", line.folder("merged"), *flags(entry.export), out="bundle")
    bundle = line.score("evaluate-bundle", line.folder("bundle"))
    speed = line.command("bench", "bench", line.folder("bundle"), "--threads", threads)["result"]
    row = {
        "task": entry.task, "model": entry.model, "data": entry.data,
        "rows": json.loads((line.folder("run") / "data" / "prepared.json").read_text(encoding="utf-8"))["rows"]["train"],
        "test_rows": results.content["runs"][f"{entry.name}/evaluate-bundle"]["result"]["rows"],
        "trained": trained_parameters(line.folder("run")),
        "threads": threads, "others_busy": trained["others_busy"],
        "minutes": sum(figures["seconds"].values()) / 60,
        "peak_mb": trained["peak_rss_mb"], "predicted_mb": figures["predicted_peak_mb"],
        "metric": entry.metric, "base": base, "head": None, "adapter": adapter, "merged": merged, "bundle": bundle,
        "precision": speed["precision"], "bundle_mb": speed["size_mb"],
        "ms": speed.get("ms_per_input") or 1000 / speed["decode_tokens_per_s"],
        "unit": "input" if speed.get("ms_per_input") else "token",
        "note": "; ".join(filter(None, [line.prepared.note, exported["result"].get("note", "")])),
    }  # fmt: skip
    keep(row)
    if entry.has_head:
        line.finetune("head", **HEAD_ALONE)
        keep({**row, "head": line.score("evaluate-head", line.folder("head"))})


def of_table(table: list[Record], what: str, metric: str) -> float:
    """Return a metric of a line of a run's closing table."""
    return next(float(row[metric]) for row in table if row["what"] == what)


def trained_parameters(run_folder: Path) -> int:
    """Return the numbers in a run's adapter, its head among them, by the header of the safetensors file."""
    with (run_folder / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
