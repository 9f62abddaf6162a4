"""Parallel text: catalogues and files of one text a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelora.data.check import scan
from edgelora.data.files import find_files
from edgelora.data.read import iterate_file
from edgelora.errors import DataError

CATALOGUE = r"""
# Translators
#, fuzzy
msgid ""
msgstr "Content-Type: text/plain\n"

msgid "a guess"
msgstr "ungefähr"

#: a.py:3
msgctxt "home"
msgid "Home"
msgstr "Startseite"

#, python-format
msgid "%(n)s day"
msgid_plural "%(n)s days"
msgstr[0] "%(n)s Tag"
msgstr[1] "%(n)s Tage"

#, fuzzy
msgid "bad"
msgstr "schlecht"

msgid "not yet"
msgstr ""

msgid ""
"two \"lines\"\n"
"of text"
msgstr ""
"zwei \"Zeilen\"\n"
"Text"
#~ msgid "old"
#~ msgstr "alt"
"""


def read(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    problems: list[str] = []
    rows = [row for _, row in iterate_file(path, lambda line, text: problems.append(f"{line}: {text}"))]
    return [(row["source"], row["target"]) for row in rows], problems


def test_a_catalogue_gives_what_is_translated(tmp_path: Path) -> None:
    path = tmp_path / "django.po"
    path.write_text(CATALOGUE, encoding="utf-8")
    rows, problems = read(path)
    assert problems == []
    assert rows == [
        ("a guess", "ungefähr"),
        ("Home", "Startseite"),
        ("%(n)s day", "%(n)s Tag"),
        ("%(n)s days", "%(n)s Tage"),
        ('two "lines"\nof text', 'zwei "Zeilen"\nText'),
    ]
    path.write_text('msgid "a\nmsgstr "b"\nnonsense\n', encoding="utf-8")
    assert len(read(path)[1]) == 2


def test_files_of_one_text_are_read_beside_each_other(tmp_path: Path) -> None:
    for name, lines in (("train.en", "one\n\ntwo\n"), ("train.de", "eins\n\nzwei\n"), ("valid.en", "x\n"), ("valid.de", "y\n")):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    assert {split: [path.name for path in files] for split, files in find_files(str(tmp_path)).items()} == {
        "train": ["train.de"], "valid": ["valid.de"]
    }  # fmt: skip
    found = scan(str(tmp_path), task=None, columns={"source": "en", "target": "de"}, valid=None)
    assert found.task.name == "translation"
    assert [row for _, _, row in found.rows("train")] == [
        {"source": "one", "target": "eins"}, {"source": "two", "target": "zwei"}
    ]  # fmt: skip
    (tmp_path / "train.de").write_text("eins\n", encoding="utf-8")
    problems: list[str] = []
    list(iterate_file(tmp_path / "train.en", lambda line, text: problems.append(text)))
    assert problems == ["train.de has no such line: the files are not of the same text"]
    with pytest.raises(DataError, match="not a data file"):
        find_files(str(Path(__file__)))
