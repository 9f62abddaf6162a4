"""Pictures: membranes, Fashion-MNIST and blood cells, and the small networks that are trained here to be adapted to them."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from training_bench.processes import ROOT, python, run

from tasks_bench.entry import Missing, Places, Prepared, new_folder, shuffled, split

PRETRAIN = ROOT / "tools" / "pretrain_pictures.py"
KINDS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
FIRST, SECOND = (0, 1, 2, 5, 8), (3, 4, 6, 7, 9)  # the halves of the classes
SIDE = 32  # of its 28 pixels: five halvings
MEMBRANE_SIDE, SCENE_SIDE, DETECTOR_SIDE = 256, 96, 128


def tool(script: Path, *arguments: object) -> None:
    """Run one of the tools that pretrain. Raises Missing with what it said."""
    measured = run(python(str(script), *map(str, arguments)))
    if not measured.done:
        raise Missing(f"tools/{script.name} failed: {measured.message}")


def made_by(script: Path, places: Places, name: str, given: tuple[object, ...], *options: object) -> Path:
    """Return the network models/NAME, trained from scratch by `script GIVEN… OUT OPTIONS…`; made once."""
    out = places.work / "models" / name
    if not (out / "model.safetensors").is_file():
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        tool(script, *given, out, *options)
    return out


def pretrained(
    places: Places, family: str, data: Path, size: int, minutes: float, *, name: str = "", batch_size: int = 16
) -> Path:
    """Return a network of a family trained here from scratch, for so many minutes; made once."""
    options = ("--size", size, "--minutes", minutes, "--batch-size", batch_size)
    return made_by(PRETRAIN, places, name or family, ("train", family, data), *options)


def scenes(places: Places, size: int, kind: str, rows: int = 400) -> Path:
    """Return generated scenes, drawn once: shapes with "masks" or "boxes", or "blobs" with boxes."""
    out = places.work / "rows" / f"scenes-{size}-{kind}"
    if not out.is_dir():
        tool(PRETRAIN, "scenes", out, "--rows", rows, "--size", size, *([] if kind == "boxes" else [f"--{kind}"]))
    return out


def copied(files: dict[str, list[tuple[Path, str]]], folder: Path) -> Path:
    """Copy (file, path inside the split) for each split into a new folder."""
    new_folder(folder)
    for name, parts in files.items():
        for source, target in parts:
            (folder / name / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name / target)
    return folder


def held_out(folder: Path) -> Path:
    """Take the folder `test` out of DATA, so that nothing of it is seen."""
    away = new_folder(folder.with_name(f"{folder.name}-held-out")) / "test"
    (folder / "test").rename(away)
    return away


def membrane(places: Places, family: str = "unet", minutes: float = 1.0) -> Prepared:
    model = pretrained(places, family, scenes(places, SCENE_SIDE, "masks"), SCENE_SIDE, minutes)
    settings = json.loads((model / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings["size"] = {"height": MEMBRANE_SIDE, "width": MEMBRANE_SIDE}
    (model / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    source = places.source("membrane")
    pictures = sorted((source / "images").iterdir())
    masks = {path.stem: path for path in (source / "masks").iterdir()}
    pairs = [(picture, masks[picture.stem]) for picture in pictures if picture.stem in masks]
    files = {
        name: [entry for image, mask in part for entry in ((image, f"images/{image.name}"), (mask, f"masks/{mask.name}"))]
        for name, part in split(pairs, test=4, valid=3, train=-1).items()
    }
    data = copied(files, places.work / "rows" / f"membrane-{family}")
    return Prepared(str(model), data, held_out(data), note=f"pretrained here for {minutes:g} min on 400 generated scenes")


def read_idx(folder: Path, name: str) -> Any:
    """Return the bytes of one of Fashion-MNIST's files, uint8 [N, 28, 28] or [N]."""
    found = sorted(folder.rglob(f"{name}*"))
    if not found:
        raise Missing(f"no {name}* in {folder}")
    content = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
    pixels = "images" in name
    values = np.frombuffer(content, np.uint8, offset=16 if pixels else 8)
    return values.reshape(-1, 28, 28) if pixels else values


def draw_classes(folder: Path, pixels: Any, classes: Any, chosen: tuple[int, ...], first: int, count: int) -> None:
    """Write `count` pictures of each class, from its number `first` on, as FOLDER/CLASS/n.png."""
    from PIL import Image

    for kind in chosen:
        (folder / KINDS[kind]).mkdir(parents=True)
        for index in np.flatnonzero(classes == kind)[first : first + count]:
            Image.fromarray(pixels[index]).resize((SIDE, SIDE)).save(folder / KINDS[kind] / f"{index}.png")


def fashion(
    places: Places, family: str = "resnet", minutes: float = 1.5, counts: tuple[int, int, int] = (200, 60, 200)
) -> Prepared:
    """Half of the classes are for pretraining, the other half for the adapter; its test pictures are the data set's own.

    counts: pictures of each class to train, to validate and to test.
    """
    source = places.source("fashion-mnist")
    pixels, classes = read_idx(source, "train-images"), read_idx(source, "train-labels")
    first, second = places.work / "rows" / "fashion-first", places.work / "rows" / f"fashion-{family}"
    if not first.is_dir():
        for name, start, count in (("train", 0, 1200), ("valid", 1200, 40)):
            draw_classes(first / name, pixels, classes, FIRST, start, count)
    new_folder(second)
    for name, start, count in (("train", 0, counts[0]), ("valid", 200, counts[1])):
        draw_classes(second / name, pixels, classes, SECOND, start, count)
    tested = read_idx(source, "t10k-images"), read_idx(source, "t10k-labels")
    draw_classes(second / "test", *tested, SECOND, 0, counts[2])
    model = pretrained(places, family, first, SIDE, minutes)
    note = f"pretrained here for {minutes:g} min on the first 5 classes (6,000 pictures), adapted to the other 5"
    return Prepared(str(model), second, held_out(second), note=note)


def cells(places: Places, family: str = "rt_detr", minutes: float = 12.0) -> Prepared:
    """A detector that was trained here for longer, on generated scenes of round things that overlap as cells do."""
    rows = 3000
    drawn = scenes(places, DETECTOR_SIDE, "blobs", rows)
    model = pretrained(places, family, drawn, DETECTOR_SIDE, minutes, name=f"{family}-blobs", batch_size=8)
    note = f"pretrained here for {minutes:g} min on {rows:,} generated scenes of overlapping blobs"
    return blood(places, f"bccd-{family}", str(model), note)


def blood(places: Places, name: str, model: str, note: str) -> Prepared:
    """Return BCCD for a model, a fifth of its pictures held out."""
    source = places.source("bccd")
    pictures = {path.stem: path for path in (source / "images").iterdir()}
    files = sorted(path for path in (source / "annotations").glob("*.xml") if path.stem in pictures)
    parts = {
        part: [
            entry
            for path in paths
            for entry in ((path, f"annotations/{path.name}"), (pictures[path.stem], f"images/{pictures[path.stem].name}"))
        ]
        for part, paths in split(shuffled(files), test=24, valid=12, train=-1).items()
    }
    data = copied(parts, places.work / "rows" / name)
    return Prepared(model, data, held_out(data), note=note)
