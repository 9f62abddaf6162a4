"""`edgelora run BUNDLE --input rows.jsonl --output out.jsonl`: a file of rows in, the same rows with an `output` out."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgelora import console
from edgelora.config import GenerateConfig
from edgelora.data.read import iterate_file
from edgelora.errors import DataError, FolderError
from edgelora.folder import disk_errors
from edgelora.run.model import Model, Prompt, load
from edgelora.tasks.base import Row, Task
from edgelora.tasks.rows import parse_json_cells, text_problems

PROMPTS = ("messages", "prompt", "text")
CLASSIFIED_AT_ONCE = 256  # rows between two updates of the progress bar


def run_file(
    bundle: Path,
    rows: Path,
    out: Path,
    config: GenerateConfig | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    threads: int | None = None,
    adapter: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `out` (JSONL, atomically): every row of a data file with an `output` added.

    A row has `messages`, `prompt` or `text`, or what the bundle's task asks for; `columns` maps these names to the data's.
    Returns rows, seconds and, for decoders, tokens. Raises DataError listing every bad row by line before anything is computed.
    """
    if out.exists() and not overwrite:
        raise FolderError(f"{out} exists already", hint="add --overwrite, or choose another file with --output")
    model = load(bundle, threads=threads, adapter=adapter)
    writes = model.task == "text-generation"
    ask = prompt_of if writes else functools.partial(asked_of, model.answerer.task)
    read = read_rows(rows, functools.partial(ask, columns=columns or {}))
    started = time.perf_counter()
    with console.progress("run", total=len(read)) as bar:
        asked = [prompt for _, prompt in read]
        tokens = 0
        if writes:
            outputs, tokens = generate_all(model, asked, config, bar.update)
        else:
            outputs = answer_all(model, asked, config, bar.update)
    write_rows(out, [{**row, "output": output} for (row, _), output in zip(read, outputs, strict=True)])
    result = {"task": model.task, "rows": len(read), "output": str(out), "seconds": time.perf_counter() - started}
    return result | ({"tokens": tokens} if model.task == "text-generation" else {})


def generate_all(
    model: Model, prompts: list[Prompt], config: GenerateConfig | None, advance: Callable[[float], None]
) -> tuple[list[Any], int]:
    """Return the answers and the number of their tokens."""
    outputs, tokens = [], 0
    for prompt in prompts:
        answer = model.answer(prompt, config)
        outputs.append(answer.text)
        tokens += len(answer.tokens)
        advance(1)
    return outputs, tokens


def answer_all(model: Model, rows: list[Row], config: GenerateConfig | None, advance: Callable[[float], None]) -> list[Any]:
    """Return the task's answer to each row."""
    outputs: list[Any] = []
    for start in range(0, len(rows), CLASSIFIED_AT_ONCE):
        part = rows[start : start + CLASSIFIED_AT_ONCE]
        outputs += model.answers(part, config=config)
        advance(len(part))
    return outputs


def read_rows(path: Path, ask: Callable[[Row], Any]) -> list[tuple[Row, Any]]:
    """Return (row, what is asked in it) for each row of a data file; raises DataError listing every bad one by line."""
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    problems: list[str] = []

    def report(line: int, problem: str) -> None:
        problems.append(f"line {line}: {problem}")

    read: list[tuple[Row, Any]] = []
    for line, row in iterate_file(path, report):
        try:
            read.append((row, ask(row)))
        except DataError as error:
            report(line, error.message)
    if problems:
        raise DataError(f"{path} has rows that cannot be run:", problems)
    if not read:
        raise DataError(f"{path} has no rows")
    return read


def asked_of(task: Task, row: Row, columns: Mapping[str, str]) -> Row:
    """Return what a task reads of a row that it is to answer. Raises DataError that says what is wrong with it."""
    names = {name: columns.get(name, name) for name in task.asked or (task.answered,)}
    if not any(theirs in row for theirs in names.values()):
        raise DataError(f"no {' or '.join(names.values())} among the keys {', '.join(map(str, row)) or '(none)'}")
    mapped = {ours: row[theirs] for ours, theirs in names.items() if theirs in row}
    asked = {name: value for name, value in task.normalize(mapped).items() if name in names}
    if problems := task.asked_problems(asked):
        raise DataError("; ".join(problems))
    return asked


def prompt_of(row: Row, columns: Mapping[str, str]) -> Prompt:
    """Return the prompt of a row. Raises DataError that says what is wrong with it."""
    names = {name: columns.get(name, name) for name in PROMPTS}
    name = next((name for name in names if names[name] in row), None)
    if name is None:
        raise DataError(f"no {' or '.join(names.values())} among the keys {', '.join(map(str, row)) or '(none)'}")
    value = row[names[name]]
    if name == "messages":
        return check_messages(parse_json_cells({name: value}, (name,))[name])
    if problems := text_problems({names[name]: value}, (names[name],)):
        raise DataError(problems[0])
    return str(value)


def check_messages(value: Any) -> Prompt:
    """Return chat messages up to the answer that is wanted: an answer at the end is left out."""
    good = isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    if not good or not value:
        raise DataError('"messages" must be a list of {"role": …, "content": …}')
    messages = value[:-1] if value[-1]["role"] == "assistant" else value
    if not messages:
        raise DataError('"messages" holds nothing but an answer')
    return list(messages)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSONL atomically: the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
