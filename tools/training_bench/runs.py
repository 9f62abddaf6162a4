"""The two sides: one run of `edgelora finetune`, one of tools/peft_baseline.py, each in a process of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_bench import rows
from training_bench.processes import ROOT, Measured, python, run

# Both sides learn alike: a constant rate, no clipping. One evaluation, for a benchmark of steps needs no more.
SETTINGS = "schedule = 'constant'\nwarmup_ratio = 0.0\nmax_grad_norm = 1e9\nevaluations = 1\n"
LEARNING_RATE = 1e-3
Runner = Callable[..., Measured]


@dataclass(frozen=True)
class Bench:
    """What every part needs: where things are, and what was asked for."""

    work: Path
    data: Path
    steps: int
    repeats: int
    threads: int
    valid_rows: int = 4
    model: str = "smollm2"

    def run_folder(self, name: str) -> Path:
        return self.work / "runs" / self.model / name

    @property
    def environment(self) -> dict[str, str]:
        """Keep what runs cache in the bench's own folder, so that the first run of a model is a first run."""
        return {"XDG_CACHE_HOME": str(self.work / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Ours:
    """One `edgelora finetune`. `options` are its command line's; `ram_mb` None is no budget."""

    name: str
    model: Path
    data: Path
    steps: int
    batch_size: int = 8
    ram_mb: int | None = None
    precision: str = "int4"
    compute: str | None = None  # operands of the products; None is what the machine's rates decide
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)  # those that have no option

    def arguments(self, bench: Bench) -> list[str]:
        """Return what `finetune` and `plan` have in common: MODEL, DATA and the settings."""
        chosen = {**({"compute": self.compute} if self.compute else {}), **self.settings}
        settings = bench.work / f"settings-{'-'.join(chosen.values()) or 'free'}.toml"
        settings.write_text(SETTINGS + "".join(f"{name} = '{value}'\n" for name, value in chosen.items()), encoding="utf-8")
        given: dict[str, Any] = {
            "config": settings, "epochs": 1000, "max-steps": self.steps, "batch-size": self.batch_size, "rank": 8,
            "learning-rate": LEARNING_RATE, "precision": self.precision, "threads": bench.threads,
            "valid-rows": bench.valid_rows, **({} if self.ram_mb is None else {"ram": f"{self.ram_mb}MB"}), **self.options,
        }  # fmt: skip
        flags = [
            part for name, value in given.items() for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
        ]
        return [str(self.model), str(self.data), *flags]


def finetune(bench: Bench, ours: Ours, runner: Runner = run) -> dict[str, Any]:
    """Train; return the record of the process with the run's `plan`, `losses` and `step_seconds` beside."""
    folder = bench.run_folder(ours.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = python("-m", "edgelora", "finetune", *ours.arguments(bench), "-o", str(folder), "--json", "--quiet")
    measured = runner(command, environment=bench.environment)
    record = {**measured.record(), "side": "edgelora", "ram_mb": ours.ram_mb, "precision": ours.precision,
              "compute": ours.compute}  # fmt: skip
    if not measured.done:
        return record
    log = rows.step_log(folder)
    plan = json.loads((folder / "edgelora.json").read_text(encoding="utf-8")).get("plan", {})
    return record | {
        "plan": plan,
        "losses": [line["loss"] for line in log],
        "step_tokens": [line["tokens"] for line in log],
        "step_seconds": [line["seconds"] for line in log],
        "tokens_per_s": measured.result.get("tokens_per_s"),
        "predicted_peak_mb": measured.result.get("predicted_peak_mb"),
    }


def peer(
    bench: Bench, model: Path, steps: Path, count: int, *, checkpointing: bool = True, runner: Runner = run, **options: Any
) -> dict[str, Any]:
    """Train the peer on the first `count` steps of a file of token ids; return the record of its process."""
    given = {"rows": steps, "steps": count, "learning-rate": LEARNING_RATE, "threads": bench.threads, **options}
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = python(str(ROOT / "tools" / "peft_baseline.py"), str(model), *flags)
    measured = runner(command + ([] if checkpointing else ["--no-checkpointing"]), environment=bench.environment)
    found = {name: measured.result.get(name) for name in ("tokens_per_s", "losses", "step_seconds")}
    return {
        **measured.record(),
        "side": "peft",
        "checkpointing": checkpointing,
        "step_tokens": measured.result.get("tokens"),
        **found,
    }


def steady_step(record: dict[str, Any]) -> float | None:
    """Return the mean seconds of the steps after the first, which warms kernels and allocators."""
    later = (record.get("step_seconds") or [])[1:]
    return sum(later) / len(later) if later else None
