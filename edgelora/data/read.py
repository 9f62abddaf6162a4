"""Rows of one file, one after the other: JSON, JSON lines, CSV, TSV, CoNLL, Parquet. What cannot be read is reported."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgelora.data.conll import is_conll, read_conll
from edgelora.data.lines import UTF8_BOM, Report, text_lines
from edgelora.data.parallel import languages_of, read_parallel, read_po
from edgelora.data.pictures import is_coco, read_coco, read_folder
from edgelora.data.squad import is_squad, read_squad
from edgelora.errors import DataError, MachineError
from edgelora.tasks.base import Row
from edgelora.tasks.rows import FILES_VARIABLE, Elsewhere

MANIFEST_NAMES = {"audio_filepath": "audio", "command": "label"}


def with_paths(row: Row, columns: Sequence[str], origin: Path, data: str) -> Row:
    """Return a row that came from `origin`, a file or folder, with the relative paths in `columns` made absolute.

    A row may name files below DATA's folder, or the origin's where that lies elsewhere, and below those of EDGELORA_FILES; any
    other path is an Elsewhere.
    """
    folder = absolute(origin if origin.is_dir() else origin.parent)
    whole = absolute(Path(data) if Path(data).is_dir() else Path(data).parent)
    named = [absolute(Path(name)) for name in os.environ.get(FILES_VARIABLE, "").split(os.pathsep) if name]
    allowed = [whole if folder.is_relative_to(whole) else folder, *named]

    def located(name: str) -> str:
        path = absolute(folder / name)
        return str(path) if any(path.is_relative_to(known) for known in allowed) else Elsewhere(path)

    return {**row, **{name: located(row[name]) for name in columns if isinstance(row.get(name), str) and row[name]}}


def absolute(path: Path) -> Path:
    """Return the path from the root, without "..": links are the user's own and stay."""
    return Path(os.path.abspath(path))


def iterate_file(path: Path, report: Report) -> Iterator[tuple[int, Row]]:
    """Return (line number, row) of a file, by its suffix; Parquet rows count from 1. Raises DataError for a whole file.

    A folder of pictures or sounds has a row for each of them (data/pictures.py). Manifests that name their files as NeMo's do
    are read as ours. Of parallel text (train.en beside train.de) any of the files stands for all.
    """
    if path.is_dir():
        return read_folder(path, report)
    if path.suffix.lower() not in READERS and languages_of(path):
        return read_parallel(path, report)
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path.name} is not a data file; allowed: {', '.join(READERS)}")
    return ((line, our_names(row)) for line, row in READERS[path.suffix.lower()](path, report))


def our_names(row: Row) -> Row:
    return row if "audio_filepath" not in row else {MANIFEST_NAMES.get(name, name): value for name, value in row.items()}


def read_jsonl(path: Path, report: Report) -> Iterator[tuple[int, Row]]:
    broken: set[int] = set()
    blank: list[int] = []

    def noted(line: int, problem: str) -> None:
        broken.add(line)
        report(line, problem)

    for number, line in text_lines(path, noted):
        if not line.strip():
            if number not in broken:
                blank.append(number)
            continue
        for gap in blank:  # Blank lines at the end are harmless, so they count only when a row follows
            report(gap, "an empty line")
        blank.clear()
        try:
            value = parse_json(line.rstrip("\r\n"))
        except ValueError as error:
            report(number, f"not JSON: {error}")
            continue
        if isinstance(value, dict):
            yield number, value
        else:
            report(number, f"a JSON {type(value).__name__}; an object is wanted")


def read_json(path: Path, report: Report) -> Iterator[tuple[int, Row]]:
    """Read an array of objects, COCO's annotations or SQuAD's questions; what begins in no such way holds JSON lines."""
    if is_coco(path):
        yield from read_coco(path, report)
        return
    if is_squad(path):
        yield from read_squad(path, report)
        return
    with path.open("rb") as file:
        if not file.read(1024).removeprefix(UTF8_BOM).lstrip().startswith(b"["):
            yield from read_jsonl(path, report)
            return
    text = "".join(line for _, line in text_lines(path, report))
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = skip(text, position, " \t\r\n")
        line, counted = line + text.count("\n", counted, position), position
        if position < len(text) and text[position] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            report(line, f"not JSON: {reason(error)}")
            return
        if isinstance(value, dict):
            yield line, value
        else:
            report(line, f"a JSON {type(value).__name__}; an object is wanted")
        position = skip(text, position, " \t\r\n")
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            report(line, "not JSON: the array is not closed")
            return


def skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def parse_json(line: str) -> Any:
    """Return the value of one line. Raises ValueError with a short reason, for duplicate keys too."""
    try:
        return json.loads(line, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(reason(error)) from None


def reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {', '.join(map(json.dumps, twice))} occurs twice")
    return found


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def read_csv(path: Path, report: Report, delimiter: str = ",") -> Iterator[tuple[int, Row]]:
    """Read a file with a header line; every row must have as many cells."""
    csv.field_size_limit(1 << 30)
    broken: set[int] = set()

    def noted(line: int, problem: str) -> None:
        broken.add(line)
        report(line, problem)

    reader = csv.reader((line for _, line in text_lines(path, noted)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    blank: list[int] = []
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report(start, f"not CSV: {error}")
            return
        if header is None:
            header = check_header(path, cells)
        elif broken.intersection(range(start, reader.line_num + 1)):
            continue
        elif not cells:
            blank.append(start)
        elif len(cells) != len(header):
            report(start, f"{len(cells)} cells; the header has {len(header)}")
        else:
            for gap in blank:
                report(gap, "an empty line")
            blank.clear()
            yield start, dict(zip(header, cells, strict=True))


def check_header(path: Path, header: list[str]) -> list[str]:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path.name}, line 1: the column {', '.join(map(json.dumps, twice))} occurs twice")
    return header


def read_tsv(path: Path, report: Report) -> Iterator[tuple[int, Row]]:
    return read_conll(path, report) if is_conll(path) else read_csv(path, report, delimiter="\t")


def read_parquet(path: Path, report: Report) -> Iterator[tuple[int, Row]]:
    """Read row by row; class labels become their names, nulls inside nested values are left out."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MachineError("Parquet files need pyarrow", hint='pip install "edgelora[train]"') from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = class_names(file.schema_arrow.metadata or {})
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {key: label_name(names.get(key), without_nulls(value)) for key, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name} is not a readable Parquet file: {error}") from None


def without_nulls(value: Any) -> Any:
    """Parquet gives every object of a list all the keys of any; those that are null were not there."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return the label names that the datasets library keeps in a Parquet schema, by column."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        inner = {key: value.get("feature", value) for key, value in features.items() if isinstance(value, dict)}
        return {key: list(value["names"]) for key, value in inner.items() if isinstance(value, dict) and "names" in value}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"the Parquet file's own description is damaged: {error}") from None


def label_name(names: list[str] | None, value: Any) -> Any:
    if names and isinstance(value, list):  # one for each token
        return [label_name(names, item) for item in value]
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


READERS: dict[str, Callable[[Path, Report], Iterator[tuple[int, Row]]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".conll": read_conll,
    ".bio": read_conll,
    ".po": read_po,
}
