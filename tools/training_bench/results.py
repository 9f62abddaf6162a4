"""What was measured, in one JSON file that is replaced after every measurement: an interrupted bench keeps what it has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgelora import console

Record = dict[str, Any]


class Results:
    """`machine`, `runs` by name, and a summary of each part. A run that is there already is not made again."""

    def __init__(self, path: Path, machine: Record) -> None:
        self.path = path
        self.content: Record = {"machine": machine, "runs": {}, "parts": {}}
        if path.is_file():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            before = self.content["machine"].get("commit")
            if before != machine["commit"]:
                console.warn(
                    f"{path} has runs of commit {before}; this is {machine['commit']}: name a new file to measure all anew"
                )

    def run(self, name: str, measure: Callable[[], Record]) -> Record:
        """Return the record of this name, measured now unless the file has it. A failed one is tried again."""
        known = self.content["runs"].get(name)
        if known is not None and known.get("outcome") in ("done", "refused", "killed"):
            console.say(f"{name}: measured before")
            return dict(known)
        record = measure()
        self.content["runs"][name] = record
        self.write()
        console.say(f"{name}: {describe(record)}")
        return record

    def part(self, name: str, summary: Any) -> None:
        """Keep the summary of a part."""
        self.content["parts"][name] = summary
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def noted(row: Record, record: Record) -> Record:
    """Return a table's row with the first line of what a run that failed said."""
    message = str(record.get("message") or "").partition("\n")[0]
    return row | ({"message": message if len(message) <= 60 else message[:59] + "…"} if message else {})


def describe(record: Record) -> str:
    """Return one line about a run."""
    speed = record.get("tokens_per_s")
    parts = [
        str(record.get("outcome", "done")),
        f"{speed:.1f} tokens/s" if speed else "",
        f"peak {record['peak_rss_mb']:.0f} MB" if record.get("peak_rss_mb") else "",
        f"{record['seconds']:.0f} s" if record.get("seconds") else "",
        f"others kept {record['others_busy']:.0%} of the processors busy" if record.get("others_busy", 0) > 0.1 else "",
        str(record.get("message") or "").partition("\n")[0],
    ]
    return ", ".join(part for part in parts if part)
