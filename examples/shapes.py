#!/usr/bin/env python3
"""Draw the example pictures: discs and squares on a plain ground, with masks, boxes and sentences. Needs Pillow.

python examples/shapes.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SIZE = 64  # pixels
ROWS = {"train": 32, "valid": 8}
NAMES = ("disc", "square")


def draw(chance: random.Random) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Return a picture, its mask (0 ground, 1 disc, 2 square) and the objects: one in each half, or in one of them."""
    from PIL import Image, ImageDraw

    ground = tuple(chance.randrange(150, 250) for _ in range(3))
    picture, mask, objects = Image.new("RGB", (SIZE, SIZE), ground), Image.new("L", (SIZE, SIZE)), []
    for side in chance.sample((0, 1), k=chance.choice((1, 2, 2))):
        kind, radius = chance.randrange(2), chance.randrange(6, 14)
        x, y = (
            side * SIZE // 2 + chance.randrange(radius + 1, SIZE // 2 - radius + 1),
            chance.randrange(radius + 1, SIZE - radius),
        )
        colour = tuple(chance.randrange(0, 120) for _ in range(3))
        corners = [x - radius, y - radius, x + radius, y + radius]
        for target, value in ((picture, colour), (mask, kind + 1)):
            brush = ImageDraw.Draw(target)
            (brush.ellipse if kind == 0 else brush.rectangle)(corners, fill=value)
        objects.append({"label": kind, "box": [corners[0], corners[1], 2 * radius + 1, 2 * radius + 1]})
    return picture, mask, objects


def draw_one(chance: random.Random) -> tuple[Any, str]:
    """Return a picture of one shape, and which it is."""
    while True:
        picture, _, objects = draw(chance)
        if len(objects) == 1:
            return picture, NAMES[objects[0]["label"]]


def sentence(objects: list[dict[str, Any]]) -> str:
    """Return what is on a picture, from left to right."""
    sides = sorted((entry["box"][0] + entry["box"][2] / 2 > SIZE / 2, NAMES[entry["label"]]) for entry in objects)
    return " and ".join(f"a {name} on the {('left', 'right')[side]}" for side, name in sides)


def main() -> None:
    chance, alone = random.Random(7), random.Random(8)
    for split, count in ROWS.items():
        areas, boxes, sentences = (HERE / name / split for name in ("shape_areas", "shape_boxes", "shape_sentences"))
        for folder in (areas / "images", areas / "masks", boxes, sentences):
            folder.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        images: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for number in range(count):
            picture, mask, objects = draw(chance)
            picture.save(areas / "images" / f"{number}.png")
            mask.save(areas / "masks" / f"{number}.png")
            picture.save(boxes / f"{number}.png")
            picture.save(sentences / f"{number}.png")
            lines.append(json.dumps({"image": f"{split}/{number}.png", "text": sentence(objects)}) + "\n")
            images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
            for entry in objects:
                area = entry["box"][2] * entry["box"][3]
                found.append({"id": len(found) + 1, "image_id": number, "category_id": entry["label"], "bbox": entry["box"],
                              "area": area, "iscrowd": 0})  # fmt: skip
        categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
        content = {"images": images, "annotations": found, "categories": categories}
        (boxes / "boxes.json").write_text(json.dumps(content) + "\n", encoding="utf-8", newline="\n")
        (HERE / "shape_sentences" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        for number in range(count):
            picture, kind = draw_one(alone)
            folder = HERE / "shape_kinds" / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{number}.png")
        (areas / "classes.txt").write_text("ground\n" + "\n".join(NAMES) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
