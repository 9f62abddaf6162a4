"""Rows to be scored: read, checked and encoded in this process, for a model that exists already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgelora.data.check import Problems, Scan, check_columns, peek_columns, scan_split
from edgelora.data.files import find_files
from edgelora.errors import DataError, did_you_mean
from edgelora.tasks.base import Example, Row, Task
from edgelora.tokenizer import Tokenizer


def read_examples(
    data: str,
    task: Task,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    max_length: int,
    truncate: bool = False,
    split: str | None = None,
    limit: int | None = None,
) -> tuple[list[Row], list[Example]]:
    """Return the normalized rows of DATA and their examples: all of a file, of a folder its test rows, else its valid ones.

    `split` names another part of a folder, `limit` the number of rows from its start. Raises DataError with every problem;
    a label that the model does not know is one.
    """
    files = find_files(data)
    if split is not None and split not in files:
        raise DataError(f"{data} has no {split} rows; it has {', '.join(files)}")
    split = split or next(name for name in ("test", "valid", "train") if name in files)
    found = peek_columns(files[split][0], columns or {})
    check_columns(task, columns or {}, found, data)
    scan = Scan(data, {split: files[split]}, task, columns or {}, found)
    scan_split(scan, split, limit)
    rows, examples = [], []
    for index, (path, line, row) in enumerate(scan.rows(split)):
        if index == len(scan.hashes[split]):
            break
        if index in scan.bad[split]:
            continue
        label = task.label(row)
        if label is not None and label not in labels:
            scan.problems.add(path, line, f'the model does not know the label "{label}".{did_you_mean(label, labels)}')
            continue
        try:
            example = task.encode(row, tokenizer, labels)
        except DataError as error:
            scan.problems.add(path, line, error.message)
            continue
        example = task.truncate(example, max_length) if truncate else example
        for text in task.example_problems(example, max_length):
            scan.problems.add(path, line, text)
        rows.append(row)
        examples.append(example)
    refuse(data, scan.problems, rows)
    return rows, examples


def refuse(data: str, problems: Problems, rows: Sequence[Row]) -> None:
    problems.refuse(data)
    if not rows:
        raise DataError(f"{data} has no rows")
