"""log.jsonl of a run folder: one line per step (its rows among them) and one per evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "log.jsonl"


class Log:
    """Appends lines; opened at a step, it drops the lines of later steps that a killed process left."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / FILE
        kept = [line for line in self._lines() if line_step(line) <= step]
        self.path.write_text("".join(kept), encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, **content: Any) -> None:
        self.file.write(json.dumps(content) + "\n")
        self.file.flush()

    def back_to(self, step: int, problem: str) -> None:
        """Note a roll-back: the steps after `step` stay in the log, marked by this line."""
        self.write(step=step, rolled_back=problem)

    def close(self) -> None:
        self.file.close()

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []


def line_step(line: str) -> float:
    """Return the step of a line; a line cut off by a kill counts as later than all."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
