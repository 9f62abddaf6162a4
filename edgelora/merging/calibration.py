"""The rows that a merge rounds with, and those that it measures the result on: a run's own, or a file of the user's."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.data.check import Problems, check_columns, map_columns, peek_columns
from edgelora.data.files import find_files
from edgelora.data.prepare import PREPARED, Prepared, sample
from edgelora.data.read import iterate_file, with_paths
from edgelora.errors import DataError
from edgelora.tasks import get_task
from edgelora.tasks.base import Example, Row, Task

if TYPE_CHECKING:
    from torch import Tensor

MIN_ROWS, MAX_ROWS = 128, 1024  # short rows: more of them, until there are MIN_TOKENS
MIN_TOKENS, MAX_TOKENS = 8192, 16384
HELD_OUT_ROWS = 64
READ_ROWS = 20_000  # of a file, from which rows are chosen at random
MAX_LENGTH = 1024
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Calibration:
    """examples: rounded with. held_out: the result is measured on these rows, which took no part; may be empty."""

    task: Task
    processor: Any
    labels: list[str]
    examples: list[Example]
    held_out: list[Example]
    rows: list[Row]
    source: str

    @property
    def tokens(self) -> int:
        return sum(map(len, self.examples))

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says."""
        return {"rows": len(self.examples), "tokens": self.tokens, "held_out_rows": len(self.held_out), "data": self.source}

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        return self.task.collate(examples, self.processor)

    def batches(self) -> list[dict[str, Tensor]]:
        """Return the examples in batches without padding, each of at most BATCH_TOKENS (or one example)."""
        from edgelora.models.predictor import to_tensors

        packed = self.task.name == "text-generation"
        order = sorted(self.examples, key=len, reverse=True)
        batches: list[list[Example]] = []
        for example in order:
            batch = batches[-1] if batches else []
            fits = batch and (len(batch) + 1) * len(batch[0]) <= BATCH_TOKENS and (packed or len(batch[0]) == len(example))
            if fits:
                batch.append(example)
            else:
                batches.append([example])
        return [to_tensors(self.collate(batch)) for batch in batches]

    def score(self, model: Any) -> dict[str, float]:
        """Return the task's metrics of a torch model on the held-out rows, without those of generated text; {} without rows."""
        return self._score(model, self.held_out, self.rows)

    def loss(self, model: Any, examples: Sequence[Example] | None = None) -> float:
        """Return the loss on the rows that are rounded with, or on some of them."""
        taken = self.examples if examples is None else examples
        return self._score(model, taken, [{}] * len(taken))["loss"]

    def _score(self, model: Any, examples: Sequence[Example], rows: Sequence[Row]) -> dict[str, float]:
        from edgelora.models.predictor import TorchPredictor

        if not examples:
            return {}
        predictor = TorchPredictor(model, functools.partial(self.task.collate, processor=self.processor))
        metrics = self.task.evaluate(predictor, rows, examples, self.processor, self.labels, generate=False)
        return {name: value for name, value in metrics.items() if isinstance(value, float)}


def from_run(run: Path, task: str, labels: list[str], settings: Mapping[str, Any]) -> Calibration | None:
    """Return training rows of a run, and the validation rows of its closing table; None for a folder without prepared rows."""
    if not (run / "data" / PREPARED).is_file():
        return None
    prepared = Prepared.open(run / "data")
    train, valid, texts = prepared.store("train"), prepared.store("valid"), prepared.texts("valid")
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    held_out, rows = sample(valid, texts, int(settings.get("valid_rows", HELD_OUT_ROWS)))
    examples = enough(train[row] for row in order)
    chosen_task = get_task(task)
    processor = chosen_task.open_processor(run)
    return Calibration(chosen_task, processor, labels, examples, held_out, rows, f"training rows of {run.name}")


def from_data(
    data: str, columns: Mapping[str, str], task_name: str, labels: list[str], folder: Path, max_length: int
) -> Calibration:
    """Read, check and encode rows of a file; a third of them, at most HELD_OUT_ROWS, are held out.

    Raises DataError with every problem of the rows that were chosen.
    """
    task = get_task(task_name)
    processor = task.open_processor(folder)
    paths = find_files(data)["train"]
    check_columns(task, columns, peek_columns(paths[0], columns), data)
    problems = Problems()
    found: list[tuple[Path, int, Row]] = []
    for path in paths:
        for line, row in iterate_file(path, functools.partial(problems.add, path)):
            if len(found) < READ_ROWS:
                taken = with_paths(task.normalize(map_columns(row, columns)), task.file_columns, path, str(data))
                found.append((path, line, taken))
    order = np.random.default_rng(0).permutation(len(found)).tolist()
    cut = min(HELD_OUT_ROWS, len(order) // 3)

    def encoded(numbers: Sequence[int]) -> list[tuple[Example, Row]]:
        pairs, tokens = [], 0
        for number in numbers:
            path, line, row = found[number]
            wrong = task.problems(row) or label_problems(task, row, labels)
            if not wrong:
                example = task.truncate(task.encode(row, processor, labels), max_length)
                wrong = task.example_problems(example, max_length)
            for text in wrong:
                problems.add(path, line, text)
            if not wrong:
                pairs.append((example, row))
                tokens += len(example)
            if len(pairs) == MAX_ROWS or (len(pairs) >= MIN_ROWS and tokens >= MAX_TOKENS):
                break
        return pairs

    held_out, used = encoded(order[:cut]), encoded(order[cut:])
    problems.refuse(data)
    examples = enough(example for example, _ in used)
    if not examples:
        raise DataError(f"{data} has no rows")
    name = f"rows of {Path(data).name}"
    return Calibration(task, processor, labels, examples, [e for e, _ in held_out], [row for _, row in held_out], name)


def label_problems(task: Task, row: Row, labels: Sequence[str]) -> list[str]:
    label = task.label(row)
    return [f'the label "{label}" is none of the model\'s'] if label is not None and label not in labels else []


def enough(examples: Any) -> list[Example]:
    """Return the first examples that suffice for second moments: MIN_ROWS, more of short ones, fewer of long ones."""
    taken: list[Example] = []
    tokens = 0
    for example in examples:
        if taken and (tokens + len(example) > MAX_TOKENS or len(taken) >= MAX_ROWS):
            break
        taken.append(example)
        tokens += len(example)
        if len(taken) >= MIN_ROWS and tokens >= MIN_TOKENS:
            break
    return taken
