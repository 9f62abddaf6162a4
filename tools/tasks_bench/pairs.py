"""Pictures with texts: Fashion-MNIST's classes in words. Networks are trained here on five classes, adapted to the others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    """Give `count` pictures for each pair of classes: one left, one right, and the text says which."""
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


@dataclass(frozen=True)
class Kind:
    """What a family is shown. counts: pictures of each class, or pair of classes, to pretrain, train, validate and test."""

    family: str
    give: Callable[[Known, Sequence[int], int, int], Iterator[tuple[Any, str]]]
    counts: tuple[int, int, int, int]
    side: int
    minutes: float


NAMED = Kind("clip", singles, (1200, 200, 40, 200), SIDE, 2.0)
MATCHED = Kind("siglip", singles, (1200, 200, 40, 200), SIDE, 2.0)
TOLD = Kind("captioner", couples, (200, 40, 4, 12), CANVAS, 3.0)


def adapted(places: Places, name: str, kind: Kind, **more: str) -> Prepared:
    """Return a network trained here on the first five classes, and DATA of the others; the data set's own test is held out."""
    source = places.source("fashion-mnist")
    train, test = ((read_idx(source, f"{part}-images"), read_idx(source, f"{part}-labels")) for part in ("train", "t10k"))
    first, second = (places.work / "rows" / f"{name}-{part}" for part in ("first", "second"))
    if not first.is_dir():
        write(first, "train", kind.give(train, FIRST, 0, kind.counts[0]))
    new_folder(second)
    for part, known, start, count in (("train", train, 0, 1), ("valid", train, 2000, 2), ("test", test, 0, 3)):
        write(second, part, kind.give(known, SECOND, start, kind.counts[count]))
    given = (kind.family, first / "train" / "train.jsonl")
    options = ("--size", kind.side, "--minutes", kind.minutes, "--batch-size", 32)
    model = made_by(PRETRAIN, places, name, given, *options)
    note = f"pretrained here for {kind.minutes:g} min on the first 5 classes, adapted to the other 5"
    return Prepared(str(model), second, held_out(second) / "test.jsonl", note=note, **more)


def names(places: Places) -> Prepared:
    return adapted(places, "fashion-names", NAMED)


def matched(places: Places) -> Prepared:
    return adapted(places, "fashion-names-siglip", MATCHED)


def captions(places: Places) -> Prepared:
    return adapted(places, "fashion-captions", TOLD, columns="caption=text")
