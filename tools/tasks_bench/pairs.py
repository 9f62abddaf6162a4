"""Pictures with texts: Fashion-MNIST's classes in words. CLIP is trained here on five classes and adapted to the others."""

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


def named(known: Known, chosen: Sequence[int], first: int, count: int) -> Iterator[tuple[Any, str]]:
    """Give `count` pictures of each class, from its number `first` on, each with its class in words."""
    from PIL import Image

    for kind in chosen:
        for index in np.flatnonzero(known[1] == kind)[first : first + count]:
            yield Image.fromarray(known[0][index]).resize((SIDE, SIDE)), f"a picture of a {KINDS[kind]}"


def names(places: Places) -> Prepared:
    """Half of the classes are for pretraining, the other half for the adapter; its test pictures are the data set's own."""
    source, minutes = places.source("fashion-mnist"), 2.0
    train, test = ((read_idx(source, f"{part}-images"), read_idx(source, f"{part}-labels")) for part in ("train", "t10k"))
    first, second = (places.work / "rows" / f"fashion-names-{part}" for part in ("first", "second"))
    if not first.is_dir():
        write(first, "train", named(train, FIRST, 0, 1200))
    new_folder(second)
    for part, known, start, count in (("train", train, 0, 200), ("valid", train, 2000, 40), ("test", test, 0, 200)):
        write(second, part, named(known, SECOND, start, count))
    given = ("clip", first / "train" / "train.jsonl")
    model = made_by(PRETRAIN, places, "fashion-names", given, "--size", SIDE, "--minutes", minutes, "--batch-size", 32)
    note = f"pretrained here for {minutes:g} min on the first 5 classes, adapted to the other 5"
    return Prepared(str(model), second, held_out(second) / "test.jsonl", note=note)
