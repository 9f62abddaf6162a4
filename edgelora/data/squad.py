"""SQuAD's JSON files: {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers"}]}]}]}, a row for each question."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgelora.data.lines import UTF8_BOM, Report, text_lines
from edgelora.errors import DataError
from edgelora.tasks.base import Row

HEAD = re.compile(rb'\s*\{\s*(?:"version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[')
KEPT = ("id", "question", "answers", "is_impossible")


def is_squad(path: Path) -> bool:
    """Tell whether a JSON file begins as SQuAD's do."""
    with path.open("rb") as file:
        return HEAD.match(file.read(1024).removeprefix(UTF8_BOM)) is not None


def read_squad(path: Path, report: Report) -> Iterator[tuple[int, Row]]:
    """Yield (number of the question, row). Raises DataError for a file that is not JSON."""
    broken: list[str] = []
    text = "".join(line for _, line in text_lines(path, lambda line, problem: broken.append(f"line {line}: {problem}")))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name} is not JSON: {error}") from None
    if broken:
        raise DataError(f"{path.name}, {broken[0]}")
    number = 0
    for article in entries(content, "data"):
        for paragraph in entries(article, "paragraphs"):
            for question in entries(paragraph, "qas"):
                number += 1
                if not isinstance(question, dict):
                    report(number, 'no question: an object with "question" and "answers" is wanted')
                    continue
                yield number, {"context": paragraph.get("context"), **{key: question[key] for key in KEPT if key in question}}


def entries(holder: Any, name: str) -> list[Any]:
    """Return a list inside an object, [] where there is none."""
    found = holder.get(name) if isinstance(holder, dict) else None
    return found if isinstance(found, list) else []
