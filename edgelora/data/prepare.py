"""Rows → stores, in a process of its own: encoding a large file leaves nothing behind in the process that trains.

OUT/prepared.json            what `Prepared` holds
OUT/{train,valid,test}/      stores of encoded rows (data/store.py)
OUT/{valid,test}.jsonl       the same rows as text, for metrics on generated text
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

import edgelora
from edgelora import console, errors
from edgelora.config import FinetuneConfig
from edgelora.data.check import Scan, scan
from edgelora.data.store import Store, StoreWriter
from edgelora.errors import DataError, EdgeLoRAError, FolderError, Interrupted, MachineError
from edgelora.folder import disk_errors, refuse_existing, write_json
from edgelora.tasks import get_task
from edgelora.tasks.base import Example, Row
from edgelora.tokenizer import read_config

PREPARED = "prepared.json"
TEXTS = ("valid", "test")
MANY_LABELS, FEW_ROWS = 50, 5  # of more labels than that, fewer rows each are told of


@dataclass(frozen=True)
class Prepared:
    folder: Path
    task: str
    labels: list[str]
    columns: list[str]
    max_length: int
    rows: dict[str, int]
    """Rows by split: train, valid, and test where there is one."""
    tokens: dict[str, int]
    supervised: dict[str, int]
    """Tokens that are targets (rows, for tasks with labels), by split."""
    truncated: int
    label_counts: dict[str, dict[str, int]]

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Read what `prepare` wrote. Raises FolderError where there is nothing usable."""
        try:
            return cls(folder=folder, **json.loads((folder / PREPARED).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise FolderError(f"{folder} has no {PREPARED}") from None
        except (ValueError, TypeError) as error:
            raise FolderError(f"{folder / PREPARED} is damaged: {error}") from None

    def store(self, split: str) -> Store:
        return Store.open(self.folder / split)

    def texts(self, split: str) -> list[Row]:
        """Return the normalized rows of "valid" or "test", in the order of the store."""
        return read_texts(self.folder / f"{split}.jsonl")


def read_texts(path: Path) -> list[Row]:
    """Return the rows that `prepare` wrote as text. Raises FolderError where they are gone or damaged."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except FileNotFoundError:
        raise FolderError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path} is damaged: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise FolderError(f"{path} is damaged: not every line is a row")
    return rows


def sample(store: Store, rows: list[Row], limit: int) -> tuple[list[Example], list[Row]]:
    """Return at most `limit` (0: all) examples and their rows, chosen at random but always the same: files are often sorted.

    Examples of a group (`Task.group`) come together, the last of them beyond the limit if need be.
    """
    chosen = list(range(len(store)))
    if 0 < limit < len(store):
        chosen = np.random.default_rng(0).permutation(len(store)).tolist()
        if "group" in store[0].arrays:
            groups = [int(store[i].arrays["group"]) for i in range(len(store))]
            first = {group: place for place, group in reversed(list(enumerate(groups[i] for i in chosen)))}
            chosen.sort(key=lambda i: first[groups[i]])
            limit += next((more for more, i in enumerate(chosen[limit:]) if groups[i] != groups[chosen[limit - 1]]), len(store))
        chosen = sorted(chosen[:limit])
    return [store[i] for i in chosen], [rows[i] for i in chosen]


def prepare(data: str, processor_folder: Path, out: Path, config: FinetuneConfig, *, max_length: int) -> Prepared:
    """Read, check, split and encode DATA into the new folder `out`, in a child process; nothing of it stays after an error.

    Raises DataError with every problem, and whatever else the child raised, as if it had happened here.
    """
    refuse_existing(out, overwrite=False)
    request = {
        "data": data,
        "processor": str(processor_folder),
        "out": str(out),
        "config": dataclasses.asdict(config),
        "max_length": max_length,
        "console": {"json_output": console.json_output(), "quiet": console.quiet()},
    }
    try:
        answer = ask_child(request, data)
        if "error" in answer:
            raise revive(answer)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return Prepared.open(out)


def ask_child(request: dict[str, Any], data: str) -> dict[str, Any]:
    """Return the answer of a new process that carries out the request; raises MachineError when it gives none."""
    package = str(Path(edgelora.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        # -P: a file of the user's named like one of our imports, in the current folder, must not be taken for it
        [sys.executable, "-P", "-m", "edgelora.data.prepare"],
        input=json.dumps(request).encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    try:
        return dict(json.loads(child.stdout))
    except ValueError:
        if child.returncode in (-signal.SIGINT, -signal.SIGTERM, 130):
            raise Interrupted("interrupted while rows were prepared; nothing was written") from None
        reason = "it was killed: not enough memory" if child.returncode in (-9, 137) else f"exit code {child.returncode}"
        raise MachineError(f"preparing {data} failed: {reason}") from None


def revive(answer: dict[str, Any]) -> EdgeLoRAError:
    """Return the error that a child wrote as JSON."""
    kind = getattr(errors, answer["error"])
    error: EdgeLoRAError = kind(answer["message"], hint=answer["hint"])
    if isinstance(error, DataError):
        error.problems = answer["problems"]
    return error


def main() -> int:
    """The child: a request as JSON on stdin, the answer as JSON on stdout, progress on stderr."""
    request = json.loads(sys.stdin.buffer.read())
    console.configure(**request["console"])
    config = FinetuneConfig(**request["config"])
    out = Path(request["out"])
    try:
        with disk_errors(out):
            write_stores(request["data"], Path(request["processor"]), out, config, request["max_length"])
        answer: dict[str, Any] = {}
    except EdgeLoRAError as error:
        problems = error.problems if isinstance(error, DataError) else []
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint, "problems": problems}
    except KeyboardInterrupt:  # the parent gets it too, and says so
        return 130
    except Exception as error:
        if os.environ.get("EDGELORA_TRACEBACK"):
            raise
        answer = unexpected(error)
    print(json.dumps(answer), flush=True)
    return 0


def unexpected(error: Exception) -> dict[str, Any]:
    """Return the answer of a child that failed at a file that it may not read, or at a defect of ours."""
    if isinstance(error, OSError) and error.filename:
        return {"error": "DataError", "message": f"{error.filename}: {error.strerror}", "hint": None, "problems": []}
    hint = "rerun with EDGELORA_TRACEBACK=1 in the environment to see where it happened"
    text = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'} (unexpected: this is a defect of EdgeLoRA)"
    return {"error": "EdgeLoRAError", "message": f"preparing rows failed: {text}", "hint": hint}


def write_stores(data: str, processor_folder: Path, out: Path, config: FinetuneConfig, max_length: int) -> None:
    with console.progress("reading rows"):
        found = scan(data, task=config.task, columns=config.columns, valid=config.valid)
    out.mkdir(parents=True, exist_ok=True)
    found.task = get_task(found.task.for_model(read_config(processor_folder / "config.json")))
    processor = found.task.open_processor(processor_folder)
    writer = Writer(found, processor, out, max_length, truncate=config.truncate)
    with writer, console.progress("encoding", sum(map(len, found.hashes.values()))) as bar:
        for split in found.files:
            for index, (path, line, row) in enumerate(found.rows(split)):
                if index not in found.bad[split]:
                    held_out = split == "train" and found.hashes[split][index] in found.valid
                    writer.add("valid" if held_out else split, path, line, found.located(path, row))
                bar.update(1)
    found.problems.refuse(data)
    for split, use in (("train", "train on"), ("valid", "validate with")):
        if not writer.rows.get(split):
            raise DataError(f"{data} leaves no row to {use}", hint="give other rows with --valid FILE")
    content = {
        "task": found.task.name,
        "labels": found.labels,
        "columns": found.found_columns,
        "max_length": max_length,
        "rows": writer.rows,
        "tokens": writer.tokens,
        "supervised": writer.supervised,
        "truncated": writer.truncated,
        "label_counts": found.label_counts,
    }
    write_json(out / PREPARED, content)
    trained = set(found.hashes["train"])
    for split in set(found.files) - {"train"}:
        if common := sum(value in trained for value in found.hashes[split]):
            console.warn(f"{common} of the {writer.rows[split]} {split} rows are in training too: their scores will flatter")
    if len(found.labels) > MANY_LABELS and writer.rows["train"] < FEW_ROWS * len(found.labels):
        each = writer.rows["train"] / len(found.labels)
        console.warn(f"{len(found.labels):,} labels with {each:.1f} rows each: is that the column with the labels?")
    if writer.truncated:
        console.warn(f"{writer.truncated} rows were cut to {max_length} {found.task.unit}")


class Writer:
    """Encodes rows into the stores of their splits; what is wrong with an encoded row joins the scan's problems."""

    def __init__(self, found: Scan, processor: Any, out: Path, max_length: int, *, truncate: bool) -> None:
        self.found, self.processor, self.out, self.max_length, self.truncate = found, processor, out, max_length, truncate
        self.stores: dict[str, StoreWriter] = {}
        self.texts: dict[str, IO[str]] = {}
        self.rows: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.supervised: dict[str, int] = {}
        self.names: set[str] = set()
        self.truncated = 0
        self.stack = ExitStack()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def add(self, split: str, path: Path, line: int, row: Row) -> None:
        try:
            example = self.found.task.encode(row, self.processor, self.found.labels)
        except DataError as error:
            self.found.problems.add(path, line, error.message)
            return
        cut = self.found.task.truncate(example, self.max_length) if self.truncate else example
        self.names = self.names or set(example.arrays)
        problems = self.found.task.example_problems(cut, self.max_length)
        if self.names != set(example.arrays):
            problems.append("its columns are not those of the first row")
        for text in problems:
            self.found.problems.add(path, line, text)
        if self.found.problems.found:
            return
        if split not in self.stores:
            self.stores[split] = StoreWriter(self.out / split)
            self.stack.callback(self.stores[split].close)
            if split in TEXTS:
                self.texts[split] = self.stack.enter_context((self.out / f"{split}.jsonl").open("w", encoding="utf-8"))
        self.truncated += len(cut) < len(example)
        if split in TEXTS:
            self.texts[split].write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        for part in self.found.task.windows(cut, self.max_length) if split == "train" else [cut]:
            self.stores[split].add(part)
            targets = 1 if part.answer_length is None else part.answer_length
            for counts, amount in ((self.rows, 1), (self.tokens, len(part)), (self.supervised, targets)):
                counts[split] = counts.get(split, 0) + amount


if __name__ == "__main__":
    sys.exit(main())
