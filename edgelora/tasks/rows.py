"""Checks of one row that several tasks share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgelora.tasks.base import Row

FILES_VARIABLE = "EDGELORA_FILES"  # folders beside the data's own below which its rows may name files
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model", "environment", "documents")


def parse_json_cells(row: Row, names: Iterable[str]) -> Row:
    """Return the row with JSON text in the named columns parsed, as CSV cells hold it; what is no JSON stays text."""
    parsed = dict(row)
    for name in names:
        if isinstance(value := row.get(name), str):
            try:
                parsed[name] = json.loads(value)
            except ValueError:
                continue
    return parsed


def text_problems(row: Row, names: Iterable[str]) -> list[str]:
    """Return what is wrong with columns that must hold text."""
    problems = []
    for name in names:
        if name not in row:
            problems.append(f'"{name}" is missing')
        elif not isinstance(row[name], str):
            problems.append(f'"{name}" is a {kind(row[name])}; text is wanted')
        elif not row[name].strip():
            problems.append(f'"{name}" is empty')
    return problems


class Elsewhere(str):
    """A path in a row that leads out of the folder of its data: never opened."""


def path_problems(row: Row, names: Iterable[str]) -> list[str]:
    """Return what is wrong with columns that must hold the path of a file."""
    names = list(names)
    away = [f"{row[name]} is outside the folder of the data: to read it, set {FILES_VARIABLE}={Path(row[name]).parent}"
            for name in names if isinstance(row.get(name), Elsewhere)]  # fmt: skip
    return away or text_problems(row, names) or [f"{row[name]} does not exist" for name in names if not is_file(row[name])]


def is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # too long for a name
        return False


def json_row(text: str, columns: Iterable[str]) -> Row | None:
    """Return the row that a text is: a JSON object with none but these columns; None for any other text."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found and set(found) <= set(columns) else None


def message_problems(messages: Any) -> list[str]:
    """Return what is wrong with a chat."""
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else f"a {kind(messages)}"
        return [f'"messages" is {found}; a list of {{"role", "content"}} is wanted']
    problems, answers = [], 0
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            problems.append(f'message {number} has no "role"')
            continue
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            problems.append(f'message {number} has the role "{role}"; allowed: system, user, assistant, tool')
        elif content is not None and not isinstance(content, str | list):
            problems.append(f'message {number}: "content" is a {kind(content)}; text is wanted')
        elif not (content.strip() if isinstance(content, str) else content) and not message.get("tool_calls"):
            problems.append(f'message {number}: "content" is empty')
        answers += role == "assistant"
    if not problems and not answers:
        problems.append("no supervised token: the chat has no assistant turn")
    return problems


def kind(value: Any) -> str:
    """Return what JSON calls a value."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)
