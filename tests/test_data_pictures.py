"""Folders and files that say what is in pictures: VOC, YOLO and COCO say the same of the same scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_scenes
from PIL import Image

from edgelora.data.check import scan
from edgelora.data.pictures import yaml_names
from edgelora.errors import DataError

NAMES = ["disc", "square"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny_scenes.save_objects(tmp_path / "rows", rows=5)


def listed(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (rows / "rows.jsonl").read_text().splitlines()]


def read(data: Path) -> list[dict[str, Any]]:
    found = scan(str(data), task=None, columns=None, valid=None)
    found.problems.refuse(str(data))
    assert found.task.name == "object-detection"
    read = [found.located(path, row) for path, _, row in found.rows("train")]
    return sorted(read, key=lambda row: str(row["image"]))


def write_voc(rows: Path) -> None:
    (rows / "annotations").mkdir()
    for row in listed(rows):
        objects = ""
        for entry in row["objects"]:
            left, top, right, bottom = entry["box"]
            sides = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
            box = "".join(f"<{side}>{value:g}</{side}>" for side, value in sides.items())
            objects += f"<object><name>{entry['label']}</name><bndbox>{box}</bndbox></object>"
        (rows / "annotations" / f"{Path(row['image']).stem}.xml").write_text(f"<annotation>{objects}</annotation>")


def write_yolo(rows: Path) -> None:
    (rows / "labels").mkdir()
    (rows / "data.yaml").write_text("train: images\nnames:\n  0: disc\n  1: square\n")
    for row in listed(rows):
        lines = []
        for entry in row["objects"]:
            left, top, right, bottom = (side / 32 for side in entry["box"])
            shares = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
            lines.append(" ".join(map(str, [NAMES.index(entry["label"]), *shares])))
        (rows / "labels" / f"{Path(row['image']).stem}.txt").write_text("\n".join(lines))


def write_coco(rows: Path) -> Path:
    images, annotations = [], []
    for number, row in enumerate(listed(rows)):
        images.append({"id": number, "file_name": Path(row["image"]).name, "width": 32, "height": 32})
        for entry in row["objects"]:
            left, top, right, bottom = entry["box"]
            box = [left, top, right - left, bottom - top]
            annotations.append({"image_id": number, "category_id": 3 + NAMES.index(entry["label"]), "bbox": box, "iscrowd": 0})
    categories = [{"id": 3 + number, "name": name} for number, name in enumerate(NAMES)]
    path = rows / "boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}, indent=1))
    return path


def test_all_formats_say_the_same(rows: Path) -> None:
    wanted = read(rows)
    assert len(wanted) == 5
    coco = write_coco(rows)
    assert read(coco) == wanted
    coco.unlink()
    write_yolo(rows)
    (rows / "rows.jsonl").rename(rows.parent / "rows.jsonl")
    found = read(rows)
    for ours, theirs in zip(found, wanted, strict=True):
        assert [entry["label"] for entry in ours["objects"]] == [entry["label"] for entry in theirs["objects"]]
        for one, other in zip(ours["objects"], theirs["objects"], strict=True):
            assert one["box"] == pytest.approx(other["box"])
    (rows.parent / "rows.jsonl").rename(rows / "rows.jsonl")
    write_voc(rows)
    (rows / "rows.jsonl").unlink()
    assert read(rows) == wanted


def test_damaged_annotations_are_listed(rows: Path) -> None:
    write_voc(rows)
    (rows / "rows.jsonl").unlink()
    (rows / "annotations" / "1.xml").write_text("<annotation>")
    (rows / "annotations" / "2.xml").write_text('<!DOCTYPE a [<!ENTITY x "y">]><annotation/>')
    (rows / "images" / "3.png").unlink()
    lines = scan(str(rows), task=None, columns=None, valid=None).problems.lines()
    assert [line.partition(": ")[0] for line in lines] == ["rows, file 2", "rows, file 3", "rows, file 4"]
    assert "1.xml cannot be read as VOC" in lines[0]
    assert "defines entities" in lines[1]
    assert "has no picture named 3" in lines[2]


def test_wrong_yolo_lines_and_coco_files(rows: Path) -> None:
    write_yolo(rows)
    (rows / "rows.jsonl").unlink()
    (rows / "labels" / "0.txt").write_text("7 0.5 0.5 0.1 0.1")
    (rows / "labels" / "1.txt").write_text("0 0.5 0.5")
    lines = scan(str(rows), task=None, columns=None, valid=None).problems.lines()
    assert ["class 7, but 2 are named" in lines[0], "is no class number and four shares" in lines[1]] == [True, True]
    path = rows.parent / "boxes.json"
    path.write_text(
        '{"images": [{"id": 1, "file_name": "../x.png"}], "annotations": [{"bbox": [0, 0, 1, 1]}], "categories": []}'
    )
    with pytest.raises(DataError, match=r"boxes.json cannot be read as COCO: 'category_id' is named nowhere|'image_id'"):
        scan(str(path), task=None, columns=None, valid=None)


def test_annotations_that_are_no_text(rows: Path) -> None:
    write_yolo(rows)
    (rows / "rows.jsonl").unlink()
    (rows / "labels" / "0.txt").write_bytes(b"\xff\xfe")
    assert "0.txt: 'utf-8' codec" in scan(str(rows), task=None, columns=None, valid=None).problems.lines()[0]
    (rows / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"classes\.txt is not UTF-8: invalid start byte at byte 0"):
        scan(str(rows), task=None, columns=None, valid=None)
    (rows / "annotations").mkdir()
    (rows / "annotations" / "1.xml").write_text('<?xml version="1.0" encoding="nope"?><annotation/>')
    with pytest.raises(DataError, match=r"1\.xml cannot be read as VOC: unknown encoding: nope"):
        scan(str(rows), task=None, columns=None, valid=None)
    path = rows.parent / "boxes.json"
    for content, said in (
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "'file_name' is named nowhere"),
        ('{"images": ' + "[" * 100_000, "recursion"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=f"boxes.json cannot be read as COCO: .*{said}"):
            scan(str(path), task=None, columns=None, valid=None)


def test_a_path_too_long_for_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": "a" * 5000, "label": "x"}) + "\n")
    lines = scan(str(path), task=None, columns=None, valid=None).problems.lines()
    assert lines[0].endswith(f"/{'a' * 5000} does not exist")


def test_files_outside_the_folder_of_the_rows_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = tmp_path / "data", tmp_path / "data-of-others"
    for where in (folder, other):
        where.mkdir()
        Image.new("RGB", (8, 8)).save(where / "a.png")
    names = ("a.png", str(folder / "a.png"), "../data/a.png", "../data-of-others/a.png", str(other / "a.png"), "../nothing.png")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"image": name, "label": str(at % 2)}) + "\n" for at, name in enumerate(names)))
    for data in (str(folder), str(path)):
        lines = scan(data, task=None, columns=None, valid=None).problems.lines()
        assert len(lines) == 3
        for line, found in zip(lines, (other / "a.png", other / "a.png", tmp_path / "nothing.png"), strict=True):
            assert line.endswith(f"{found} is outside the folder of the data: to read it, set EDGELORA_FILES={found.parent}")
    monkeypatch.setenv("EDGELORA_FILES", str(other))
    lines = scan(str(path), task=None, columns=None, valid=None).problems.lines()
    assert len(lines) == 1
    assert "nothing.png is outside the folder" in lines[0]


def test_names_of_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    for text in ("names: ['a b', c]\n", "nc: 2\nnames:\n- a b\n- c\n", 'names:\n  0: "a b"\n  1: c\nnc: 2\n'):
        path.write_text(text)
        assert yaml_names(path) == ["a b", "c"]
