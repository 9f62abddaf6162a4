"""Spans of a text with a label, as rows have them: their text, its words, and what is wrong with them.

A word is what is tagged: a given token, or letters and digits that belong together, or any other character (and each character
of scripts without spaces). Tags are IOB2: B- begins a span, I- goes on, O is outside (Ramshaw and Marcus, cmp-lg/9505040).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from edgelora.tasks.base import Row
from edgelora.tasks.rows import kind

Range = tuple[int, int]  # of characters: the first, and the one after the last
Span = tuple[int, int, str]

UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
WORD = re.compile(f"[{UNSPACED}]|(?:(?![{UNSPACED}])\\w)+|[^\\w\\s]")
TAG = re.compile(r"([BIESLU])-(.+)", re.DOTALL)
OUTSIDE = ("O", "")


def text_of(row: Row) -> tuple[str, list[Range]]:
    """Return the text of a row, given tokens with a space between them, and its words."""
    if "tokens" not in row:
        return row["text"], [match.span() for match in WORD.finditer(row["text"])]
    words, position = [], 0
    for token in row["tokens"]:
        words.append((position, position + len(token)))
        position += len(token) + 1
    return " ".join(row["tokens"]), words


def spans_of(row: Row) -> list[Span]:
    """Return the spans of a row without problems, in order."""
    if "tags" in row:
        return spans_of_tags(row["tags"], text_of(row)[1])
    return sorted(map(read_span, row.get("spans") or ()))


def spans_of_tags(tags: Sequence[str], words: Sequence[Range]) -> list[Span]:
    """Return the spans that tags [words] say: IOB1, IOB2, BIOES or BILOU; a tag of another form is a span of one word.

    An I- that continues nothing begins a span, as seqeval's default has it.
    """
    spans: list[Span] = []
    going_on: str | None = None
    for tag, (start, end) in zip(tags, words, strict=True):
        match = TAG.fullmatch(tag)
        prefix, label = match.groups() if match else ("U", tag)
        if tag in OUTSIDE:
            going_on = None
            continue
        if prefix in "IEL" and going_on == label:
            spans[-1] = (spans[-1][0], end, label)
        else:
            spans.append((start, end, label))
        going_on = label if match and prefix in "BI" else None
    return spans


def read_span(given: Any) -> Span:
    """Return a span that is {"start", "end", "label"} or [start, end, label]. Raises ValueError that says what is wrong."""
    values: list[Any]
    if isinstance(given, dict):
        values = [given.get(name) for name in ("start", "end", "label")]
    elif isinstance(given, list | tuple) and len(given) == 3:
        values = list(given)
    else:
        raise ValueError(f'is a {kind(given)}; {{"start", "end", "label"}} is wanted')
    start, end, label = values
    for name, value in (("start", start), ("end", end)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f'has a {kind(value)} as "{name}"; the number of a character is wanted')
    if not isinstance(label, str) or not label.strip():
        raise ValueError(f'has {"an empty text" if label == "" else f"a {kind(label)}"} as "label"; a name is wanted')
    return start, end, label


def span_problems(row: Row) -> list[str]:
    """Return what is wrong with the spans of a row that has a text."""
    text, given = row["text"], row.get("spans")
    if not isinstance(given, list):
        return ['"spans" is missing'] if given is None else [f'"spans" is a {kind(given)}; a list is wanted']
    problems, good = [], []
    for number, entry in enumerate(given, 1):
        try:
            start, end, label = read_span(entry)
        except ValueError as error:
            problems.append(f"span {number} {error}")
            continue
        if not 0 <= start < end <= len(text):
            problems.append(f"span {number} is from {start} to {end}; the text has {len(text)} characters")
        elif not WORD.search(text, start, end):
            problems.append(f"span {number} ({label}) holds no word: {text[start:end]!r}")
        else:
            good.append((start, end, label))
    good.sort()
    for one, other in pairwise(good):
        if other[0] < one[1]:
            problems.append(f"spans overlap: {show(text, one)} and {show(text, other)}")
    return problems


def token_problems(row: Row, names: Sequence[str] = ("tokens", "tags")) -> list[str]:
    """Return what is wrong with the tokens of a row and their tags, or with its tokens alone."""
    problems = []
    for name in names:
        values = row.get(name)
        if values is None:
            problems.append(f'"{name}" is missing')
        elif not isinstance(values, list) or not values:
            found = "empty" if values == [] else f"a {kind(values)}"
            problems.append(f'"{name}" is {found}; a list of texts is wanted')
        else:
            wrong = [(i, value) for i, value in enumerate(values, 1) if not isinstance(value, str)]
            problems += [f'"{name}": entry {i} is a {kind(value)}; a text is wanted' for i, value in wrong[:1]]
            empty = [i for i, value in enumerate(values, 1) if isinstance(value, str) and not value.strip()]
            problems += [f'"{name}": entry {i} is empty' for i in empty[:1] if name == "tokens"]
    if not problems and "tags" in names and len(row["tokens"]) != len(row["tags"]):
        problems.append(f"{len(row['tokens'])} tokens and {len(row['tags'])} tags")
    return problems


def show(text: str, span: Span) -> str:
    start, end, label = span
    return f'{start} to {end} ("{text[start:end]}", {label})'


def marked(text: str, spans: Iterable[tuple[int, int, str]]) -> str:
    """Return the text with ⟦span: note⟧ around each span, which do not overlap."""
    parts, position = [], 0
    for start, end, note in spans:
        parts += [text[position:start], f"⟦{text[start:end]}: {note}⟧"]
        position = end
    return "".join([*parts, text[position:]])
