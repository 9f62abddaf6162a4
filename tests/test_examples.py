"""The example rows: what the templates give, held out by template, answers that parse, one for each task."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from edgelora.config import FinetuneConfig
from edgelora.data.describe import describe
from edgelora.tasks import TASKS

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/templates.toml"))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", EXAMPLES / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_rows_are_what_the_templates_give(folder: Path) -> None:
    for path, text in generator().make_files(folder).items():
        assert path.read_text(encoding="utf-8") == text, f"run: python examples/generate.py ({path})"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_each_template_belongs_to_one_split(folder: Path) -> None:
    recipe = tomllib.loads((folder / "templates.toml").read_text(encoding="utf-8"))
    split_of: dict[str, str] = {}
    for command in recipe["command"]:
        for split in ("train", "valid", "test"):
            for template in command[split]:
                form = " ".join(template.replace("{ask}", "").split())
                assert split_of.setdefault(form, split) == split, f'"{template}" is in {split_of[form]} and {split}'
    assert {"train", "valid", "test"} == set(split_of.values())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_no_sentence_occurs_twice(folder: Path) -> None:
    rows = [row for split in ("train", "valid", "test") for row in read_rows(folder / f"{split}.jsonl")]
    sentences = [next(iter(row.values())) for row in rows]
    assert len(sentences) == len(set(sentences))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_no_markup_is_left(folder: Path) -> None:
    for split in ("train", "valid", "test"):
        for row in read_rows(folder / f"{split}.jsonl"):
            assert not re.search(r"[\[\]{}|]", next(iter(row.values())))


def test_home_commands_are_calls_of_known_tools() -> None:
    arguments: dict[str, tuple[str, ...]] = {}
    for split in ("train", "valid", "test"):
        for row in read_rows(EXAMPLES / "home_commands" / f"{split}.jsonl"):
            call = json.loads(row["completion"])
            assert row["completion"] == json.dumps(call), "one spelling of the JSON, so that exact match is fair"
            assert arguments.setdefault(call["tool"], tuple(call)) == tuple(call)
    assert len(arguments) == 10


def test_labels_are_balanced() -> None:
    for split in ("train", "valid", "test"):
        labels = [row["label"] for row in read_rows(EXAMPLES / "device_messages" / f"{split}.jsonl")]
        counts = {label: labels.count(label) for label in labels}
        assert len(counts) == 6
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_readme_counts_the_rows() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for folder in FOLDERS:
        counts = [len(read_rows(folder / f"{split}.jsonl")) for split in ("train", "valid", "test")]
        line = next(line for line in readme.splitlines() if line.startswith(f"| `{folder.name}/`"))
        assert line.endswith(f"| {', '.join(map(str, counts))} |")


def listed() -> dict[str, str]:
    """Return the first task of each example, by its path, as the README lists them."""
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z0-9-]+)", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {path.rstrip("/"): task for path, task in rows}


def test_the_readme_lists_every_example() -> None:
    known = {path.partition("/")[0] for path in listed()}
    assert known == {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    own = {f"bookings/{path.name}" for path in (EXAMPLES / "bookings").iterdir()}
    assert own == {path for path in listed() if path.startswith("bookings/")}


def test_each_task_has_an_example() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in TASKS if name not in readme] == []


@pytest.mark.parametrize(("path", "task"), listed().items(), ids=listed())
def test_each_example_is_read_as_its_task(path: str, task: str) -> None:
    found = describe(str(EXAMPLES / path), None, FinetuneConfig(task=task))
    assert found["task"] == task
    assert found["splits"]["train"]["rows"] > 0


@pytest.mark.parametrize(
    ("number", "words"), [(0, "zero"), (11, "eleven"), (20, "twenty"), (35, "thirty five"), (100, "a hundred")]
)
def test_number_words(number: int, words: str) -> None:
    assert generator().number_words(number) == words
