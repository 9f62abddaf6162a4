"""Parallel text: `.po` catalogues, and files of one text a line in several languages, train.en beside train.de.

    .po            {"source": msgid, "target": msgstr}; of plurals the singular and the first plural form
    train.en …     {"en": line, "de": line}, a column for each language: --columns source=en,target=de says which is which

Of a catalogue entries that are not translated, fuzzy (a guess that nobody has looked at) or obsolete are left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from edgelora.data.lines import Report, text_lines
from edgelora.tasks.base import Row

LANGUAGE = re.compile(r"\.[a-z]{2,3}([_-][A-Za-z]{2,8})?")
KEY = re.compile(r'(msgctxt|msgid_plural|msgid|msgstr(?:\[\d+\])?)\s+(".*")\s*')
OTHERS = (".md", ".txt", ".csv", ".tsv", ".py", ".sh", ".gz", ".zip", ".bz2", ".xz", ".log", ".ini", ".cfg", ".js", ".pdf")


def languages_of(path: Path) -> list[Path]:
    """Return the files of the same text in other languages, and `path` itself, sorted; [] where it stands alone."""
    if not is_language(path):
        return []
    found = sorted(other for other in path.parent.glob(f"{path.stem}.*") if other.stem == path.stem and is_language(other))
    return found if len(found) > 1 else []


def is_language(path: Path) -> bool:
    return LANGUAGE.fullmatch(path.suffix) is not None and path.suffix not in OTHERS and path.is_file()


def parallel_files(folder: Path) -> list[Path]:
    """Return the first file of each text that a folder has in several languages."""
    return [path for path in sorted(folder.rglob("*")) if languages_of(path)[:1] == [path]]


def read_parallel(path: Path, report: Report) -> Iterator[tuple[int, Row]]:
    """Read the lines of all languages beside each other; lines that are empty in all of them are left out."""
    files = languages_of(path)
    texts = [((line, text.rstrip("\r\n")) for line, text in text_lines(file, report)) for file in files]
    names = [file.suffix.removeprefix(".") for file in files]
    for number, lines in enumerate(zip_longest(*texts), 1):
        missing = [name for name, line in zip(names, lines, strict=True) if line is None]
        if missing:
            report(number, f"{path.stem}.{missing[0]} has no such line: the files are not of the same text")
            return
        row = {name: line[1] for name, line in zip(names, lines, strict=True)}
        if any(text.strip() for text in row.values()):
            yield number, row


def read_po(path: Path, report: Report) -> Iterator[tuple[int, Row]]:
    """Read a catalogue of GNU gettext (its manual, section "The Format of PO Files")."""
    entry: dict[str, str] = {}
    start, key, fuzzy = 0, "", False
    for number, line in text_lines(path, report):
        text = line.strip()
        if text.startswith("#"):
            if "msgid" in entry and (rows := translated(entry, fuzzy)):
                yield from ((start, row) for row in rows)
            if "msgid" in entry:
                entry, fuzzy = {}, False
            fuzzy = fuzzy or (text.startswith("#,") and "fuzzy" in text)
            continue
        found = KEY.fullmatch(text)
        if found is not None and found[1] in ("msgctxt", "msgid") and "msgstr" in " ".join(entry):
            yield from ((start, row) for row in translated(entry, fuzzy))
            entry, fuzzy = {}, False
        if found is not None:
            key, quoted = found[1], found[2]
            start = number if key in ("msgctxt", "msgid") and not entry else start
        elif text.startswith('"') and key:
            quoted = text
        elif not text:
            continue
        else:
            report(number, f"not a line of a catalogue: {text[:60]}")
            continue
        try:
            entry[key] = entry.get(key, "") + str(ast.literal_eval(quoted))
        except (ValueError, SyntaxError):
            report(number, f"not a quoted text: {quoted[:60]}")
    yield from ((start, row) for row in translated(entry, fuzzy))


def translated(entry: dict[str, str], fuzzy: bool) -> list[Row]:
    """Return the rows of one entry."""
    if fuzzy or not entry.get("msgid"):  # the header has an empty msgid
        return []
    single = entry.get("msgstr") or entry.get("msgstr[0]")
    pairs = [(entry["msgid"], single), (entry.get("msgid_plural"), entry.get("msgstr[1]"))]
    return [{"source": source, "target": target} for source, target in pairs if source and target]
