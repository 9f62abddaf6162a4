"""`edgelora evaluate`: the task's own metrics, by the same code for a run, a merged folder, a model and a bundle."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import console
from edgelora.data.check import Problems, check_columns, map_columns, peek_columns
from edgelora.data.files import find_files
from edgelora.data.prepare import read_texts
from edgelora.data.read import iterate_file, with_paths
from edgelora.errors import DataError, FolderError, MachineError, SettingsError, did_you_mean
from edgelora.folder import MANIFEST, read_manifest
from edgelora.tasks import get_task, guess_task

if TYPE_CHECKING:
    from edgelora.models.source import ModelSource
    from edgelora.tasks.base import Example, Predictor, Row, Task

KINDS = ("bundle", "run", "merged")


@dataclass(frozen=True)
class Target:
    """What is evaluated, loaded. `folder` has the tokenizer; a row has at most `max_length` tokens."""

    kind: str  # "bundle" | "run" | "merged" | "model"
    task: Task
    labels: list[str]
    folder: Path
    max_length: int
    predictor: Predictor


def evaluate(
    target: str | Path,
    data: str | None = None,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    rows: int | None = None,
    generate: bool = True,
    float_: bool = False,
    adapter: str | None = None,
    truncate: bool = False,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score RUN, MERGED, MODEL or BUNDLE on the rows of DATA (the first `rows` of them; default: all).

    A RUN without DATA is scored on its own test rows, else its validation rows; of a DATA folder the test file, else the
    validation file, is taken. `adapter` names one of a BUNDLE's. `float_` keeps the base of a RUN in fp32. `generate` adds the
    metrics of generated text. Returns {"target", "kind", "task", "split", "rows", "metrics", "seconds"}.
    """
    if rows is not None and rows < 1:
        raise SettingsError(f"{rows} rows cannot be scored; at least 1 is wanted")
    kind, manifest = describe(target)
    if float_ and kind != "run":
        raise SettingsError(f"--float is for runs; {target} is a {kind}", hint=f"edgelora evaluate {target} DATA")
    if adapter is not None and kind != "bundle":
        raise SettingsError(f"--adapter is for bundles; {target} is a {kind}", hint=f"edgelora evaluate {target} DATA")
    own = own_rows(Path(target)) if kind == "run" and data is None else None
    if data is None and own is None:
        raise SettingsError(f"no rows to score {target} on", hint=f"edgelora evaluate {target} rows.jsonl")
    name = task if kind == "model" else manifest.get("task")
    chosen = get_task(name) if name else guess_task(peek(data, columns))
    if task and chosen.name != task:
        raise SettingsError(f'{target} is for the task "{chosen.name}", not "{task}"')
    with console.progress("loading"):
        if kind == "bundle":
            loaded = load_bundle(target, chosen, threads=threads, adapter=adapter)
        else:
            trusted = trust_remote_code
            loaded = load_torch(target, kind, manifest, chosen, float_=float_, threads=threads, trust_remote_code=trusted)
    processor = chosen.open_processor(loaded.folder)
    if own is not None:
        split, taken = own[0], Rows(loaded, processor, str(target), {}, truncate=truncate).encode(own[1], rows)
    else:
        assert data is not None
        split, taken = Rows(loaded, processor, data, columns or {}, truncate=truncate).read(rows)
    started = time.perf_counter()
    with console.progress(f"evaluating {len(taken.rows)} rows"):
        metrics = chosen.evaluate(loaded.predictor, taken.rows, taken.examples, processor, loaded.labels, generate=generate)
    seconds = round(time.perf_counter() - started, 2)
    head = {"target": str(target), "kind": kind, "task": chosen.name, "split": split}
    return {**head, "rows": len(taken.rows), "metrics": metrics, "seconds": seconds}


def describe(target: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the kind of a target and its manifest, {} for a model."""
    folder = Path(target).expanduser()
    if not (folder / MANIFEST).is_file():
        return "model", {}
    manifest = read_manifest(folder, *KINDS)
    if not manifest.get("complete"):
        raise FolderError(f"{folder} has not finished training", hint=f"edgelora finetune MODEL DATA -o {folder} --resume")
    return str(manifest["kind"]), manifest


def peek(data: str | None, columns: Mapping[str, str] | None) -> list[str]:
    assert data is not None
    files = find_files(data, trains=False)
    return peek_columns(files[best_split(files)][0], columns or {})


def best_split(files: Mapping[str, Any]) -> str:
    return next(split for split in ("test", "valid", "train") if split in files)


def own_rows(run: Path) -> tuple[str, Path] | None:
    """Return the split and file of the rows that a run kept for evaluation."""
    files = ((split, run / "data" / f"{split}.jsonl") for split in ("test", "valid"))
    return next(((split, path) for split, path in files if path.is_file()), None)


def load_bundle(target: str | Path, task: Task, *, threads: int | None, adapter: str | None) -> Target:
    from edgelora.run.model import load
    from edgelora.run.predictor import OnnxPredictor

    model = load(target, threads=threads, adapter=adapter, native=False)  # what every runtime computes
    return Target("bundle", task, model.labels, model.bundle.folder, model.bundle.max_length, OnnxPredictor(model))


def load_torch(
    target: str | Path,
    kind: str,
    manifest: dict[str, Any],
    task: Task,
    *,
    float_: bool,
    threads: int | None,
    trust_remote_code: bool,
) -> Target:
    """Build the torch model of a run (base and adapter), a merged folder, or a plain model in fp32."""
    import torch

    from edgelora.adapters.inject import put_on_grid
    from edgelora.hardware import physical_cores
    from edgelora.models.load import load_model
    from edgelora.models.predictor import TorchPredictor
    from edgelora.models.source import open_model
    from edgelora.planning.plan import DEFAULT_LENGTH
    from edgelora.tokenizer import length_limit
    from edgelora.train.on_grid import ship

    torch.set_num_threads(threads or physical_cores())
    source = open_model(str(target), trust_remote_code=trust_remote_code)
    labels = list(manifest["labels"]) if manifest else config_labels(source.config) if task.has_labels else []
    if kind == "run" and not float_:
        base_bits = int(manifest["plan"]["base_bits"])
    else:
        base_bits = 32 if kind == "merged" else float_bits(source, str(target))
    scaled = kind == "run" and manifest["settings"].get("method") == "scales"
    if scaled and float_:
        raise SettingsError(f"{target} has trained the scales of integers: it has no float base", hint="leave out --float")
    bits = manifest["grid"]["bits"] if scaled else None
    model = load_model(source, task.name, base_bits=base_bits, labels=labels, bits=bits)
    folder = Path(target) if kind == "run" else source.folder
    if kind == "run":
        apply_adapter(model, source, folder, manifest)
        if manifest["grid"] and not float_ and not scaled:
            put_on_grid(model, manifest["grid"])
            ship(model, folder, manifest["grid"])
    collate = functools.partial(task.collate, processor=task.open_processor(folder))
    max_length = min((manifest.get("settings") or {}).get("max_length") or DEFAULT_LENGTH, length_limit(source.config))
    return Target(kind, task, labels, folder, max_length, TorchPredictor(model, collate))


def float_bits(source: ModelSource, target: str) -> int:
    """Return 32, or 16 where fp32 weights do not fit the memory. Raises MachineError where these do not either."""
    from edgelora.held_out import affordable_bits

    bits = affordable_bits(source)
    if bits is None:
        raise MachineError(f"{target} does not fit the memory in 16 bits", hint="evaluate a bundle: edgelora export")
    if bits < 32:
        console.say(f"the weights do not fit the memory in fp32: they are kept in {bits} bits")
    return bits


def apply_adapter(model: Any, source: ModelSource, run: Path, manifest: dict[str, Any]) -> None:
    """Put a run's adapter on its base. Raises FolderError where the base is not the one that it was trained on."""
    from edgelora.adapters import peft_format, scales
    from edgelora.scales_delta import read_delta

    if source.fingerprint != manifest["model"]["fingerprint"]:
        raise FolderError(
            f"{run} was trained on {manifest['model']['reference']} as it was then; that model's files have changed since"
        )
    if manifest["settings"].get("method") == "scales":
        scales.apply(model, read_delta(run))
    else:
        peft_format.apply(model, peft_format.load(run))


def config_labels(config: dict[str, Any]) -> list[str]:
    names = config.get("id2label") or {}
    return [str(names[key]) for key in sorted(names, key=int)]


@dataclass(frozen=True)
class Taken:
    rows: list[Row]
    examples: list[Example]


@dataclass(frozen=True)
class Rows:
    """Rows for a target, checked and encoded; every problem is reported at once."""

    target: Target
    processor: Any
    data: str
    columns: Mapping[str, str]
    truncate: bool

    def read(self, limit: int | None) -> tuple[str, Taken]:
        """Return the split and its first `limit` rows from the files of DATA."""
        files = find_files(self.data, trains=False)
        split = best_split(files)
        check_columns(self.target.task, self.columns, peek_columns(files[split][0], self.columns), self.data)
        problems = Problems()

        def rows() -> Iterator[tuple[Path, int, Row]]:
            for path in files[split]:
                for line, row in iterate_file(path, functools.partial(problems.add, path)):
                    found = self.target.task.normalize(map_columns(row, self.columns))
                    yield path, line, with_paths(found, self.target.task.file_columns, path, str(self.data))

        # Where there is nothing but one set of rows, nobody has said that it is for training.
        return "given" if split == "train" else split, self._take(rows(), problems, limit)

    def encode(self, path: Path, limit: int | None) -> Taken:
        """Return the first `limit` rows of a file of rows that are normalized already."""

        rows = ((path, line, row) for line, row in enumerate(read_texts(path), 1))
        return self._take(rows, Problems(), limit)

    def _take(self, rows: Iterator[tuple[Path, int, Row]], problems: Problems, limit: int | None) -> Taken:
        taken = Taken([], [])
        for path, line, row in rows:
            if limit is not None and len(taken.rows) == limit:
                break
            found = self.target.task.problems(row) or self._encode(row, taken)
            for text in found:
                problems.add(path, line, text)
        problems.refuse(self.data)
        if not taken.rows:
            raise DataError(f"{self.data} has no rows")
        return taken

    def _encode(self, row: Row, taken: Taken) -> list[str]:
        """Add a row to `taken`, or return what is wrong with it."""
        task, labels, length = self.target.task, self.target.labels, self.target.max_length
        if unknown := task.unknown(task.label_names(row), labels):
            return [f'the label "{unknown[0]}" does not occur in training.{did_you_mean(unknown[0], labels)}']
        try:
            example = task.encode(row, self.processor, labels)
        except DataError as error:
            return [error.message]
        if self.truncate:
            example = task.truncate(example, length)
        if problems := task.example_problems(example, length):
            return problems
        taken.rows.append(row)
        taken.examples.append(example)
        return []
