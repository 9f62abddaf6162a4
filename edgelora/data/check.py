"""The first pass over rows: which task, which columns, what is wrong with each row, which rows validate."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from edgelora.data.files import Files, find_files
from edgelora.data.read import iterate_file, with_paths
from edgelora.data.split import choose_valid, parse_share, row_hash
from edgelora.errors import DataError, SettingsError, did_you_mean
from edgelora.tasks import TASKS, get_task, guess_task
from edgelora.tasks.base import Row, Task

PEEK = 100


class Problems:
    """What is wrong, by file and line, in the order of the files."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, str, Path]] = []
        self.order: dict[Path, int] = {}

    def add(self, path: Path, line: int, text: str) -> None:
        place = self.order.setdefault(path, len(self.order))
        self.found.append((place, line, text, path))

    def lines(self) -> list[str]:
        found = sorted(self.found, key=lambda entry: entry[:3])
        return [f"{path.name}, {'file' if path.is_dir() else 'line'} {line}: {text}" for _, line, text, path in found]

    def refuse(self, data: str) -> None:
        """Raise DataError with every problem, if there is one."""
        if not self.found:
            return
        lines = self.lines()
        texts = " ".join(lines)
        hint = None
        if "over the limit" in texts:
            hint = "--truncate cuts long rows, --max-length N allows longer ones"
        elif " is missing" in texts:
            hint = "--columns prompt=mr,completion=ref maps our names to the data's"
        raise DataError(f"{data} has {len(lines)} problem{'s' if len(lines) > 1 else ''}:", lines, hint=hint)


@dataclass
class Scan:
    """What the first pass found. `hashes` has one entry per row of a split, bad rows included, so that passes can be zipped."""

    data: str
    files: Files
    task: Task
    columns: Mapping[str, str]
    found_columns: list[str]
    problems: Problems = field(default_factory=Problems)
    hashes: dict[str, array[int]] = field(default_factory=dict)
    bad: dict[str, set[int]] = field(default_factory=dict)
    """Indices of the rows of a split that have a problem of their own."""
    labels: list[str] = field(default_factory=list)
    label_counts: dict[str, Counter[str]] = field(default_factory=dict)
    valid: set[int] = field(default_factory=set)
    """Hashes of the rows of "train" that validate instead; empty where there is a file of validation rows."""

    def located(self, path: Path, row: Row) -> Row:
        """Return a row of `path` with the paths that it holds as they are found from here; rows are hashed without."""
        return with_paths(row, self.task.file_columns, path, self.data)

    def rows(self, split: str) -> Iterator[tuple[Path, int, Row]]:
        """Yield (file, line, normalized row) of every readable row of a split's files."""
        for path in self.files[split]:

            def report(line: int, text: str, path: Path = path) -> None:
                if split not in self.hashes:  # the first pass reports, later ones read the same again
                    self.problems.add(path, line, text)

            for line, row in iterate_file(path, report):
                yield path, line, self.task.normalize(map_columns(row, self.columns))


def scan(data: str, *, task: str | None, columns: Mapping[str, str] | None, valid: str | None) -> Scan:
    """Read all rows once. Row problems are collected in `problems`; DataError is for what concerns the data as a whole."""
    share = parse_share(valid)
    files = find_files(data)
    if share is not None and "valid" in files:
        raise SettingsError(f"--valid {valid}: {data} has validation rows of its own", hint="leave --valid out")
    if valid is not None and share is None:
        files["valid"] = find_files(valid)["train"]
    columns = columns or {}
    found = peek_columns(files["train"][0], columns)
    check_names(columns, [get_task(task)] if task else [get_task(name) for name in TASKS])
    chosen = get_task(task) if task else guess_task(found)
    check_columns(chosen, columns, found, data)
    result = Scan(data, files, chosen, columns, found)
    names = {split: scan_split(result, split) for split in files}
    if not len(result.hashes["train"]) and not result.problems.found:
        raise DataError(f"{data} has no rows")
    if "valid" not in files:
        split_train(result, names["train"], share)
    if chosen.has_labels or chosen.keeps_labels:
        check_labels(result, names)
    return result


def scan_split(result: Scan, split: str, limit: int | None = None) -> list[tuple[str, ...]]:
    """Check each row of a split (or the first `limit` ones) and hash it; return the labels that occur in each."""
    hashes, bad, names = array("Q"), set(), []
    for path, line, row in islice(result.rows(split), limit):
        located = result.located(path, row)
        problems = result.task.problems(located) + encoding_problems(row)
        for text in problems:
            result.problems.add(path, line, text)
        if problems:
            bad.add(len(hashes))
        group = result.task.group(row) if not problems else None
        hashes.append(row_hash(row if group is None else {"group": group}))
        names.append(tuple(result.task.label_names(located)) if not problems else ())
    result.hashes[split], result.bad[split] = hashes, bad
    return names


def split_train(result: Scan, names: list[tuple[str, ...]], share: float | None) -> None:
    """Choose the rows that validate; rows with one label give their share of each."""
    good = [index for index in range(len(names)) if index not in result.bad["train"]]
    labels = [row_names[0] if len(row_names) == 1 else None for row_names in names]
    hashes = result.hashes["train"]
    result.valid = choose_valid([hashes[i] for i in good], [labels[i] for i in good], share) if good else set()
    if good and not result.valid and not result.problems.found:
        why = "no label has two different ones" if any(labels) else "all are the same"
        raise DataError(f"{result.data} has no rows to spare for validation: {why}", hint="give another file with --valid FILE")


def check_labels(result: Scan, names: dict[str, list[tuple[str, ...]]]) -> None:
    """Find the labels of training rows; report labels of other rows that are not among them, and labels of mixed types.

    names: the labels of each row of a split.
    """
    train, valid = result.hashes["train"], result.valid
    counts: dict[str, Counter[str]] = {"train": Counter(), **({"valid": Counter()} if valid else {})}
    for row_names, value in zip(names["train"], train, strict=True):
        counts["valid" if value in valid else "train"].update(row_names)
    for split in set(names) - {"train"}:
        counts[split] = Counter(name for row_names in names[split] for name in row_names)
    result.labels = result.task.labels(counts["train"])
    known = set(result.labels)
    result.label_counts = counts
    if not known and not counts["train"] and not result.problems.found:
        raise DataError(f"no row of {result.data} has a label to learn")
    if 0 < len(known) < result.task.fewest_labels and not result.problems.found:
        raise DataError(f'every row of {result.data} has the label "{result.labels[0]}"; at least two are needed')
    kinds: dict[str, tuple[Path, int]] = {}
    for split in result.files:
        for index, (path, line, row) in enumerate(result.rows(split)):
            if index in result.bad[split]:
                continue
            if row.get("label") is not None:
                kinds.setdefault(type(row["label"]).__name__, (path, line))
            if not known or (split == "train" and result.hashes[split][index] not in valid):
                continue
            for name in result.task.unknown(names[split][index], known):
                close = did_you_mean(name, known)
                result.problems.add(path, line, f'the label "{name}" does not occur in training.{close}')
    if len(kinds) > 1:
        types = {"str": "text", "int": "numbers", "bool": "true and false"}
        for name, (path, line) in kinds.items():
            result.problems.add(path, line, f"labels are of mixed types: {types.get(name, name)} here")


def peek_columns(path: Path, columns: Mapping[str, str]) -> list[str]:
    """Return the columns of the first rows, in our names. Raises DataError when nothing can be read."""
    problems = Problems()
    found: dict[str, None] = {}
    rows = iterate_file(path, lambda line, text: problems.add(path, line, text))
    for number, (_, row) in enumerate(rows, 1):
        found |= dict.fromkeys(row)
        if number == PEEK:
            break
    if not found:
        problems.refuse(path.name)
        raise DataError(f"{path.name} has no rows")
    missing = [
        f'"{theirs}" (for {ours}).{did_you_mean(theirs, found)}' for ours, theirs in columns.items() if theirs not in found
    ]
    if missing:
        raise DataError(f"{path.name} has no column {', '.join(missing)} Columns: {', '.join(found)}")
    return list(dict.fromkeys([*columns, *(name for name in found if name not in columns.values())]))


def check_columns(task: Task, columns: Mapping[str, str], found: list[str], data: str) -> None:
    """Refuse data without the task's columns, and names that the task does not have."""
    check_names(columns, [task])
    if not task.matches(set(found)):
        wanted = ", or ".join(" and ".join(shape) for shape in task.shapes)
        raise DataError(
            f"{task.name} wants the columns {wanted}; {data} has {', '.join(found)}",
            hint=f"--columns {task.shapes[-1][-1]}={found[-1]} maps our names to the data's",
        )


def check_names(columns: Mapping[str, str], tasks: Sequence[Task]) -> None:
    """Refuse names on our side of --columns that none of the tasks has."""
    known = list(dict.fromkeys(column.name for task in tasks for column in task.columns))
    for ours in columns:
        if ours not in known:
            message = f'--columns: "{ours}" is not one of our columns.{did_you_mean(ours, known)} Columns: {", ".join(known)}'
            raise SettingsError(message, hint="--columns OURS=THEIRS,OURS=THEIRS")


def map_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row under our names."""
    if not columns:
        return row
    taken = set(columns.values())
    return {name: value for name, value in row.items() if name not in taken} | {
        ours: row[theirs] for ours, theirs in columns.items() if theirs in row
    }


def encoding_problems(value: Any, where: str = "") -> list[str]:
    r"""Return the columns whose text is no Unicode: JSON can write half a character ("\ud83d"), which has no UTF-8 form."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in encoding_problems(item, where or str(key))]
    if isinstance(value, list):
        return [found for item in value for found in encoding_problems(item, where)]
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return [f'"{where}" holds half a character ({ascii(value[error.start])[1:-1]}): wrong encoding']
        if "\0" in value:
            return [f'"{where}" holds a NUL character']
    return []
