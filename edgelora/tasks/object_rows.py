"""The objects of a row: checked, and their boxes in shares of the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import DataError
from edgelora.images import ImageProcessor
from edgelora.tasks.base import Example, Row
from edgelora.tasks.boxes import centres
from edgelora.tasks.rows import kind

SLACK = 1.5  # pixels that a box may be outside: formats count from 0 or from 1, and round


def as_objects(row: Row) -> Row:
    """Return the row with objects as a list, where they are columns of boxes (left, top, width, height) and categories."""
    given = row.get("objects")
    columns = ("bbox", "category")
    if not isinstance(given, dict) or not all(isinstance(given.get(name), list) for name in columns):
        return row
    pairs = zip(given["bbox"], given["category"], strict=False)
    found = [{"label": label, "box": to_corners(box)} for box, label in pairs]
    return {**row, "objects": found}


def to_corners(box: Any) -> Any:
    """Return [left, top, right, bottom] of [left, top, width, height]; what is none stays as it is."""
    if not four_numbers(box):
        return box
    left, top, width, height = box
    return [left, top, left + width, top + height]


def four_numbers(box: Any) -> bool:
    numbers = isinstance(box, list | tuple) and len(box) == 4
    return numbers and all(isinstance(side, int | float) and math.isfinite(side) for side in box)


def object_problems(row: Row) -> list[str]:
    """Return what is wrong with a row's objects, whatever its picture is."""
    if "objects" not in row:
        return ['"objects" is missing']
    if not isinstance(row["objects"], list):
        return [f'"objects" is a {kind(row["objects"])}; a list of {{"label", "box"}} is wanted']
    problems = []
    for number, entry in enumerate(row["objects"], 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("label"), str | int) or entry["label"] == "":
            problems.append(f"object {number} has no label")
        elif not four_numbers(entry.get("box")):
            problems.append(f"object {number} has no box of four numbers: left, top, right, bottom")
        elif entry["box"][2] <= entry["box"][0] or entry["box"][3] <= entry["box"][1]:
            problems.append(f"object {number} has a box without an inside: {shown(entry['box'])}")
    return problems


def box_shares(objects: Sequence[dict[str, Any]], width: int, height: int) -> NDArray[np.float32]:
    """Return the boxes as centre, width and height in shares of a picture, fp32 [M, 4].

    Raises DataError for a box that leaves the picture by more than a pixel or so.
    """
    if not objects:
        return np.zeros((0, 4), np.float32)
    sides = np.array([entry["box"] for entry in objects], np.float64)
    limits = np.array([width, height, width, height], np.float64)
    outside = np.flatnonzero(((sides < -SLACK) | (sides > limits + SLACK)).any(1))
    if len(outside):
        first = objects[int(outside[0])]
        raise DataError(
            f"the box {shown(first['box'])} of object {int(outside[0]) + 1} ({first['label']}) leaves the picture, "
            f"{width} × {height} pixels"
        )
    return np.asarray(centres(np.clip(sides, 0, limits) / limits), np.float32)


def padded_pictures(examples: Sequence[Example], processor: ImageProcessor) -> dict[str, NDArray[Any]]:
    """Return the batch of examples (tasks/object_detection.py), pictures of several sizes filled up at the right and below."""
    shapes = np.stack([example.arrays["shape"] for example in examples])
    most = max(1, *(len(example.arrays["classes"]) for example in examples))
    batch = {
        "pixel_values": np.zeros((len(examples), 3, *shapes.max(0)), np.float32),
        "pixel_mask": np.zeros((len(examples), *shapes.max(0)), np.int64),
        "labels": np.full((len(examples), most), -1, np.int64),
        "labels_boxes": np.zeros((len(examples), most, 4), np.float32),
    }
    for number, (example, (height, width)) in enumerate(zip(examples, shapes, strict=True)):
        pixels = processor.normalize(example.arrays["pixels"].reshape(height, width, 3))
        batch["pixel_values"][number, :, :height, :width] = pixels
        batch["pixel_mask"][number, :height, :width] = 1
        count = len(example.arrays["classes"])
        batch["labels"][number, :count] = example.arrays["classes"]
        batch["labels_boxes"][number, :count] = example.arrays["boxes"]
    return batch


def shown(box: Sequence[float]) -> str:
    return f"[{', '.join(f'{side:g}' for side in box)}]"
