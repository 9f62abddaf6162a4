"""Pictures with texts: Fashion-MNIST's classes in words. Networks are trained here on five classes, adapted to the others."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from training_bench.processes import ROOT

from tasks_bench.entry import SEED, Places, Prepared, new_folder
from tasks_bench.pictures import FIRST, KINDS, SECOND, SIDE, held_out, made_by, read_idx
from tasks_bench.texts import write_jsonl

PRETRAIN = ROOT / "tools" / "pretrain_pairs.py"
CANVAS = 64  # of a picture of two
Known = tuple[Any, Any]  # pixels uint8 [N, 28, 28] and their classes [N]


def write(folder: Path, part: str, pictures: Iterable[tuple[Any, str]]) -> None:
    """Write FOLDER/PART/PART.jsonl with columns image and text, and the pictures beside it."""
    (folder / part / "pictures").mkdir(parents=True)
    rows = []
    for number, (picture, text) in enumerate(pictures):
        picture.save(folder / part / "pictures" / f"{number}.png")
        rows.append({"image": f"pictures/{number}.png", "text": text})
    random.Random(SEED).shuffle(rows)
    write_jsonl(folder / part / f"{part}.jsonl", rows)


def singles(known: Known, chosen: Sequence[int], first: int, count: int) -> Iterator[tuple[Any, str]]:
    """Give `count` pictures of each class, from its number `first` on, each with its class in words."""
    from PIL import Image

    for kind in chosen:
        for index in np.flatnonzero(known[1] == kind)[first : first + count]:
            yield Image.fromarray(known[0][index]).resize((SIDE, SIDE)), f"a picture of a {KINDS[kind]}"


def couples(known: Known, chosen: Sequence[int], first: int, count: int) -> Iterator[tuple[Any, str]]:
    """Give `count` pictures for each pair of classes: one left, one right, the text says which; no picture is used twice within
    the class's own."""
    from PIL import Image

    draw = random.Random(SEED)
    indices = {kind: np.flatnonzero(known[1] == kind)[first : first + count * len(chosen)] for kind in chosen}
    for left in chosen:
        for right in chosen:
            for _ in range(count):
                canvas = Image.new("L", (CANVAS, CANVAS))
                for kind, x in ((left, draw.randint(0, 4)), (right, CANVAS // 2 + draw.randint(0, 4))):
                    canvas.paste(Image.fromarray(known[0][draw.choice(indices[kind])]), (x, draw.randint(0, CANVAS - 28)))
                yield canvas, f"a {KINDS[left]} left of a {KINDS[right]}"


def adapted(places: Places, family: str, name: str, minutes: float, size: int, **more: str) -> Prepared:
    """Return a network of a family, trained here on the first five classes, and DATA of the others with the data set's own test
    pictures held out."""
    source = places.source("fashion-mnist")
    train, test = ((read_idx(source, f"{part}-images"), read_idx(source, f"{part}-labels")) for part in ("train", "t10k"))
    give, counts = (singles, (1200, 200, 60, 200)) if family == "clip" else (couples, (200, 40, 8, 12))
    first, second = (places.work / "rows" / f"{name}-{part}" for part in ("first", "second"))
    if not first.is_dir():
        write(first, "train", give(train, FIRST, 0, counts[0]))
    new_folder(second)
    write(second, "train", give(train, SECOND, 0, counts[1]))
    write(second, "valid", give(train, SECOND, 2000, counts[2]))
    write(second, "test", give(test, SECOND, 0, counts[3]))
    rows = first / "train" / "train.jsonl"
    model = made_by(PRETRAIN, places, name, (family, rows), "--size", size, "--minutes", minutes, "--batch-size", 32)
    note = f"pretrained here for {minutes:g} min on the first 5 classes, adapted to the other 5"
    return Prepared(str(model), second, held_out(second) / "test.jsonl", note=note, **more)


def names(places: Places) -> Prepared:
    return adapted(places, "clip", "fashion-names", 3.0, SIDE)


def captions(places: Places) -> Prepared:
    return adapted(places, "captioner", "fashion-captions", 5.0, CANVAS, columns="caption=text")
