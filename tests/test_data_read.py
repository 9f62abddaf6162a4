"""Reading rows: every format gives the same rows, and every fault is named with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from edgelora.data.files import find_files
from edgelora.data.read import iterate_file
from edgelora.errors import DataError

ROWS = [{"prompt": 'a, "b"\n\u2028c', "completion": "é\t世"}, {"prompt": "2", "completion": "line\r\nend"}]


def read(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, str]]]:
    problems: list[tuple[int, str]] = []
    return list(iterate_file(path, lambda line, text: problems.append((line, text)))), problems


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_table(path: Path, delimiter: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([list(ROWS[0]), *(list(row.values()) for row in ROWS)])
    return path


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for path in (
        write(tmp_path / "rows.jsonl", lines + "\n\n"),
        write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + lines.encode()),
        write(tmp_path / "crlf.jsonl", lines.replace("\n", "\r\n")),
        write(tmp_path / "lines.json", lines),
        write(tmp_path / "rows.json", json.dumps(ROWS, indent=2)),
        write(tmp_path / "bom.json", b"\xef\xbb\xbf " + json.dumps(ROWS).encode()),
        write_table(tmp_path / "rows.csv", ","),
        write_table(tmp_path / "rows.TSV", "\t"),
        tmp_path / "rows.parquet",
    ):
        rows, problems = read(path)
        assert ([row for _, row in rows], problems) == (ROWS, []), path.name


def test_rows_know_their_lines(tmp_path: Path) -> None:
    assert [line for line, _ in read(write(tmp_path / "a.json", '[\n{"a": 1},\n\n{"a":\n2}, {"a": 3}]'))[0]] == [2, 4, 5]
    assert [line for line, _ in read(write(tmp_path / "a.csv", 'a\n1\n"2\n2"\n3\n\n'))[0]] == [2, 3, 5]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', [(2, "not UTF-8: byte 0xe9 at position 8")]),
        ("b.jsonl", b'{"a": "x\x00y"}\n{"a": 1}\n', [(1, "a NUL byte at position 9")]),
        ("c.jsonl", b'{"a": 1, "a": 2}\n{"b": {"c": 1, "d": 2, "c": 3}}\n',
         [(1, 'not JSON: the key "a" occurs twice'), (2, 'not JSON: the key "c" occurs twice')]),
        ("d.jsonl", b'{"a": 1\n[1]\n\n3\n{"a": NaN}\n{"a": 1}\n',
         [(1, "not JSON: Expecting ',' delimiter at column 8"), (2, "a JSON list; an object is wanted"), (3, "an empty line"),
          (4, "a JSON int; an object is wanted"), (5, "not JSON: NaN is not a JSON value")]),
        ("e.jsonl", b"[" * 100_000, [(1, "not JSON: nested too deeply")]),
        ("a.json", b'[{"a": 1}, 2, {"a": 1, "a": 2}]',
         [(1, "a JSON int; an object is wanted"), (1, 'not JSON: the key "a" occurs twice')]),
        ("b.json", b'[{"a": 1},\n{"a": 2}', [(2, "not JSON: the array is not closed")]),
        ("c.json", b'[{"a": 1} {"a": 2}]', [(1, "not JSON: the array is not closed")]),
        ("a.csv", b"a,b\n1,2\n3\n\n4,5,6\n7,8\n", [(3, "1 cells; the header has 2"), (5, "3 cells; the header has 2"),
                                                  (4, "an empty line")]),
        ("b.csv", b"a,b\n\xff,2\n3,4\n", [(2, "not UTF-8: byte 0xff at position 1")]),
        ("c.csv", b'a,b\n"1,2\n', [(2, "not CSV: unexpected end of data")]),
        ("d.csv", b'a,b\n"1"x,2\n', [(2, "not CSV: ',' expected after '\"'")]),
    ],
)  # fmt: skip
def test_faults_are_named_with_their_lines(name: str, content: bytes, wanted: list[tuple[int, str]], tmp_path: Path) -> None:
    assert read(write(tmp_path / name, content))[1] == wanted


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.csv", b"a,b,a\n1,2,3\n", 'a.csv, line 1: the column "a" occurs twice'),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "a.jsonl is UTF-16 text; UTF-8 is wanted"),
        ("a.txt", b"x", "a.txt is not a data file; allowed: .jsonl, .json, .csv, .tsv, .parquet, .conll, .bio, .po"),
    ],
)
def test_files_that_cannot_be_read_at_all(name: str, content: bytes, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / name, content))
    assert caught.value.message == wanted


def test_parquet_gives_label_names_and_no_nulls_of_its_own(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": None, "name": "x"}]
    table = pyarrow.Table.from_pylist([{"label": 1, "messages": messages}])
    features = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet")
    row = read(tmp_path / "a.parquet")[0][0][1]
    assert row["label"] == "pos"
    assert row["messages"] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "name": "x"}]
    with pytest.raises(DataError, match=r"^b\.parquet is not a readable Parquet file: "):
        read(write(tmp_path / "b.parquet", b"PAR1 no"))


def test_folders_have_splits(tmp_path: Path) -> None:
    for name in ("data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "validation.csv", "test/0.json",
                 "README.md", ".cache/train.jsonl"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"")
    files = {split: [p.relative_to(tmp_path).as_posix() for p in paths] for split, paths in find_files(str(tmp_path)).items()}
    assert files == {
        "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        "valid": ["validation.csv"],
        "test": ["test/0.json"],
    }


def test_folders_without_training_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", b"")
    assert find_files(str(tmp_path)) == {"train": [tmp_path / "rows.jsonl"]}
    write(tmp_path / "more.csv", b"")
    with pytest.raises(DataError) as caught:
        find_files(str(tmp_path))
    assert caught.value.message == f"{tmp_path} has no train file; found: more.csv, rows.jsonl"
    assert caught.value.hint == "name the files train.jsonl, valid.jsonl and test.jsonl"
    with pytest.raises(DataError, match=r"^no such file or folder: nowhere/rows\.jsonl$"):
        find_files("nowhere/rows.jsonl")
