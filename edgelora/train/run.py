"""The run folder: what is recorded before the first step, so that another process can go on with nothing but the folder."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import hardware
from edgelora.config import FinetuneConfig
from edgelora.errors import FolderError, SettingsError
from edgelora.folder import read_manifest, write_json, write_manifest
from edgelora.planning.plan import Plan
from edgelora.tokenizer import TOKENIZER_FILES
from edgelora.tokenizer import length_limit as length_limit  # for those who read a run

if TYPE_CHECKING:
    from edgelora.models.source import ModelSource
    from edgelora.train.checkpoint import State

DATA = "data"


@dataclass(frozen=True)
class Run:
    """The record of a run. `settings` are as the user gave them, `plan` is what they came to."""

    model: dict[str, Any]  # reference, fingerprint, license
    data: str
    task: str
    labels: list[str]
    settings: FinetuneConfig
    plan: Plan
    grid: dict[str, Any] = field(default_factory=dict)  # what the training rounds to; empty where it does not

    def write(self, folder: Path, *, complete: bool, **results: Any) -> None:
        """Write the manifest; `results` is empty until the run is trained."""
        write_manifest(
            folder,
            "run",
            complete=complete,
            task=self.task,
            labels=self.labels,
            model=self.model,
            data=self.data,
            settings=dataclasses.asdict(self.settings),
            plan=dataclasses.asdict(self.plan),
            grid=self.grid,
            **results,
        )

    @classmethod
    def read(cls, folder: Path) -> tuple[Run, dict[str, Any]]:
        """Return the record and the whole manifest of a run folder."""
        manifest = read_manifest(folder, "run")
        try:
            settings = FinetuneConfig(**manifest["settings"])
            plan = Plan(**manifest["plan"])
            run = cls(
                manifest["model"], manifest["data"], manifest["task"], manifest["labels"], settings, plan, manifest["grid"]
            )
        except (KeyError, TypeError) as error:
            raise FolderError(f"{folder} is damaged: {error}", hint="start again with --overwrite") from None
        return run, manifest

    def refuse_other(self, source: ModelSource, data: str, config: FinetuneConfig) -> None:
        """Raise SettingsError that lists what a resumed run was asked to do differently.

        A setting that has its default was not asked for.
        """
        problems = []
        if source.fingerprint != self.model["fingerprint"]:
            problems.append(f"the model is {source.reference}; the run's is {self.model['reference']}, or its files changed")
        if Path(data).name != Path(self.data).name:
            problems.append(f"the data is {data}; the run's is {self.data}")
        for known in dataclasses.fields(config):
            asked, recorded = getattr(config, known.name), getattr(self.settings, known.name)
            if asked not in (known.default, recorded):
                problems.append(f"{known.name} is {asked}; the run's is {recorded}")
        if problems:
            raise SettingsError(
                "\n  ".join(["a resumed run keeps its settings:", *problems]),
                hint="leave them out, or start again with --overwrite",
            )


def outcome(state: State, plan: Plan, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the figures of a finished training, `seconds` by stage among them."""
    peak = max(state.peak_rss_mb, hardware.peak_rss_mb())
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "tokens_per_s": state.timed_tokens / state.timed_seconds if state.timed_seconds else None,
        "peak_rss_mb": peak,
        "predicted_peak_mb": plan.predicted_peak_mb,
        "peak_error": peak / plan.predicted_peak_mb - 1.0,
        "train_loss": state.train_loss,
        "best_step": state.best["step"],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def copy_model_files(source: ModelSource, labels: list[str], folder: Path) -> None:
    """Put config.json (with the labels) and the tokenizer's files into a run folder."""
    config = dict(source.config)
    if labels:
        config |= {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    write_json(folder / "config.json", config)
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
