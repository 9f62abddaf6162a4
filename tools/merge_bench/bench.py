"""What every part needs: where things are, what was asked for, and steps that are made once.

A step is a process with a record in the results file and, mostly, a folder in the work folder. It is not made again where
both are there, and no step that it reads has been made since.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_bench import models
from training_bench.processes import Measured, python, run
from training_bench.results import Record, Results

from edgelora import console
from merge_bench import environments

SCORE = Path(__file__).with_name("score.py")
PEERS = Path(__file__).with_name("peers")
Runner = Callable[..., Measured]


class StepFailed(Exception):
    """A step that others need has failed; its message says which, and why."""


@dataclass(frozen=True)
class Bench:
    """`config`: a TOML file for every training of ours; `runner` starts processes (another one in tests)."""

    work: Path
    results: Results
    steps: int
    rows: int
    threads: int
    config: Path | None = None
    runner: Runner = run

    @property
    def setup(self) -> str:
        """The name of these settings, in the names of records and folders."""
        if self.config is None:
            return f"{self.steps}-steps"
        content = hashlib.sha256(self.config.read_bytes()).hexdigest()[:8]
        return f"{self.steps}-steps-{self.config.stem}-{content}"

    @property
    def model(self) -> Path:
        """SmolLM2 in Hugging Face layout."""
        return models.folder_of(models.SMOLLM2, self.work)

    def place(self, name: str) -> Path:
        """Return where the step of this name leaves its folder."""
        return self.work / "merge" / self.setup / name

    def step(self, name: str, command: Callable[[], list[str]], out: Path | None = None, **environment: str) -> Record:
        """Return the record of a step, which writes `out` in a process of its own. Raises StepFailed."""
        key, words = f"{self.setup}/{name}", command()
        inputs = self.inputs(words, name)
        known = self.results.content["runs"].get(key, {})
        if known.get("inputs") != inputs or (out is not None and not out.exists()):
            self.results.content["runs"].pop(key, None)

        def make() -> Record:
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)
                out.parent.mkdir(parents=True, exist_ok=True)
            everywhere = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            record = self.runner(words, environment={**everywhere, **environment}).record()
            return {**record, "inputs": inputs, "made": time.time()}

        record = self.results.run(key, make)
        if record["outcome"] != "done":
            raise StepFailed(f"{name} {record['outcome']}: {record['message']}")
        return record

    def inputs(self, words: list[str], own: str) -> dict[str, float]:
        """Return when the steps were made whose folders a command names: one that is made anew makes those after it anew."""
        made, folder = {}, self.place(".")
        for path in map(Path, words):
            name = path.relative_to(folder).parts[0] if folder in path.parents else own
            record = self.results.content["runs"].get(f"{self.setup}/{name}")
            if record is not None and name != own:
                made[name] = record["made"]
        return made

    def verb(self, name: str, verb: str, /, *arguments: Any, out: Path | None = None, **options: Any) -> Record:
        """Run a verb of edgelora; an option that is None is left out, one that is True has no value."""
        flags: list[str] = []
        for option, value in options.items():
            if value is not None:
                flag = f"--{option.replace('_', '-')}"
                flags += [flag] if value is True else [flag, str(value)]
        place = [] if out is None else ["--output", str(out)]
        words = [str(argument) for argument in arguments]
        return self.step(name, lambda: python("-m", "edgelora", verb, *words, *place, *flags, "--json", "--quiet"), out)

    def record(self, name: str) -> Record:
        """Return the record of a step that was made before."""
        return dict(self.results.content["runs"][f"{self.setup}/{name}"])

    def finetune(self, name: str, model: Path | str, data: Path, **options: Any) -> Path:
        """Train a run and return its folder."""
        out = self.place(name)
        given = {"epochs": 1000, "max_steps": self.steps, "threads": self.threads, "config": self.config, "valid_rows": 8}
        self.verb(name, "finetune", model, data, out=out, **{**given, **options})
        return out

    def export(self, name: str, source: Path | str, **options: Any) -> Path:
        """Export a run, a merged folder or a model and return the bundle, also one that has lost too much: that is measured."""
        out = self.place(name)
        self.verb(name, "export", source, out=out, force=True, **options)
        return out

    def evaluate(self, name: str, target: Path | str, rows: Path, **options: Any) -> dict[str, Any]:
        """Return the metrics of `edgelora evaluate` without generation."""
        record = self.verb(name, "evaluate", target, rows, no_generate=True, threads=self.threads, **options)
        metrics: dict[str, Any] = record["result"]["metrics"]
        return metrics

    def peer(self, name: str, environment: str, script: str, *arguments: Any, out: Path | None = None) -> Record:
        """Run a script of peers/, or a module (-m NAME), in a peer's environment."""
        words = [str(argument) for argument in arguments]

        def command() -> list[str]:
            what = ["-m", script] if not script.endswith(".py") else [str(PEERS / script)]
            return [environments.interpreter(environment, self.work), "-P", *what, *words]

        return self.step(name, command, out)

    def score(self, name: str, kind: str, model: Path, heldout: Path) -> float:
        """Return the held-out loss of a Hugging Face folder ("torch") or a decoder's ONNX file ("onnx")."""
        command = python(str(SCORE), kind, str(model), str(heldout), "--threads", str(self.threads))
        record = self.step(f"{name}/{self.rows}-rows", lambda: command)
        loss: float = record["result"]["loss"]
        return loss


def attempt(what: str, do: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return the table's row that `do` makes of the arguments; where a step failed, a row that says so."""
    try:
        return {"what": what, **do(*arguments)}
    except StepFailed as failure:
        text = str(failure).partition("\n")[0]
        console.warn(str(failure))
        return {"what": what, "note": text if len(text) <= 60 else text[:59] + "…"}


def folder_mb(folder: Path, pattern: str = "*") -> float:
    """Return the MB of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file()) / 2**20
