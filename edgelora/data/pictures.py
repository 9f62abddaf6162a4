"""Folders of pictures as rows: by label (of sounds too), with masks, with boxes as VOC, YOLO and COCO write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from edgelora.data.lines import Report
from edgelora.errors import DataError
from edgelora.tasks.base import Row

Rows = Iterator[tuple[int, Row]]

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")
IMAGES = ("images", "JPEGImages")
NAMES = ("classes.txt", "labels.txt", "obj.names")
YOLO_YAML = ("data.yaml", "dataset.yaml")
COCO = re.compile(r'\s*\{\s*"(info|images|annotations|categories|licenses|type)"\s*:\s*[\[{"]')
MOST_XML = 16 << 20  # bytes


def read_folder(folder: Path, report: Report) -> Rows:
    """Return (number of the picture, row) of a folder, by its layout:

    images/ + masks/     {"image", "mask"} for each pair of the same name; classes.txt names the masks' values
    annotations/*.xml    {"image", "objects"}, VOC; the pictures beside them or in images/
    labels/*.txt         the same, YOLO; the names of the classes in classes.txt or data.yaml
    LABEL/…/x.jpg        {"image", "label"}; of sounds {"audio", "label"}
    """
    if (masks := subfolder(folder, "masks")) is not None and subfolder(folder, *IMAGES) is not None:
        return read_masks(folder, masks)
    if xml := voc_files(folder):
        return read_voc(folder, xml, report)
    if (labels := subfolder(folder, "labels")) is not None and subfolder(folder, *IMAGES) is not None:
        return read_yolo(folder, labels, report)
    return read_labelled(folder)


def has_pictures(folder: Path) -> bool:
    """Tell whether a folder has one of these layouts."""
    return any(media_column(path) for path in folder.glob("*/**/*")) or bool(voc_files(folder))


def subfolder(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def media_column(path: Path) -> str | None:
    """Return the column that a picture's or a sound's path stands in, None of other files."""
    if path.name.startswith((".", "_")):
        return None
    suffix = path.suffix.lower()
    return "image" if suffix in PICTURES else "audio" if suffix in SOUNDS else None


def by_stem(folder: Path) -> dict[str, Path]:
    """Return the pictures of a folder by their name without its suffix, in the order of their names."""
    return {path.stem: path for path in sorted(folder.iterdir()) if media_column(path) == "image"}


def read_labelled(folder: Path) -> Rows:
    """Read FOLDER/LABEL/…/picture.jpg (or sound.wav), in the order of their names."""
    files = sorted(path.relative_to(folder) for path in folder.glob("*/**/*") if media_column(path))
    for number, path in enumerate(files, 1):
        yield number, {str(media_column(path)): path.as_posix(), "label": path.parts[0]}


def read_masks(folder: Path, masks: Path) -> Rows:
    """Read images/NAME.jpg with masks/NAME.png. A picture without a mask has none in its row, which the task refuses."""
    images = subfolder(folder, *IMAGES)
    assert images is not None
    values, found = mask_values(folder), by_stem(masks)
    for number, (stem, path) in enumerate(by_stem(images).items(), 1):
        row: Row = {"image": path.relative_to(folder).as_posix()}
        if stem in found:
            row["mask"] = found[stem].relative_to(folder).as_posix()
        yield number, row | ({"values": values} if values else {})


def mask_values(folder: Path) -> dict[str, str | None]:
    """Return what classes.txt says that values mean: its first line 0, the next 1, …; of two classes 255 is the second too."""
    names = class_names(folder)
    values: dict[str, str | None] = {str(number): name for number, name in enumerate(names)}
    return values | ({"255": names[1]} if len(names) == 2 else {})


def class_names(folder: Path) -> list[str]:
    """Return the classes that a folder (or the one around it) lists, one a line, or data.yaml under `names`."""
    for place in (folder, folder.parent):
        if path := next((place / name for name in NAMES if (place / name).is_file()), None):
            return [line.strip() for line in text_of(path).splitlines() if line.strip()]
        if path := next((place / name for name in YOLO_YAML if (place / name).is_file()), None):
            return yaml_names(path)
    return []


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}", hint="save it as UTF-8") from None


def yaml_names(path: Path) -> list[str]:
    """Return `names` of a YOLO data.yaml: a list, in one line or several, or numbers with names."""
    text = text_of(path)
    if found := re.search(r"^names:[ \t]*\[(.*?)\]", text, re.MULTILINE | re.DOTALL):
        return [name.strip().strip("'\"") for name in found[1].split(",") if name.strip()]
    block = re.search(r"^names:[ \t]*\n((?:[ \t]*(?:-|\d+:).*\n?)+)", text, re.MULTILINE)
    if block is None:
        raise DataError(f"{path.name} has no list of names", hint="names: [cat, dog]")
    return [re.sub(r"^\s*(?:-|\d+:)\s*", "", line).strip().strip("'\"") for line in block[1].splitlines() if line.strip()]


def voc_files(folder: Path) -> list[Path]:
    place = subfolder(folder, "annotations", "Annotations") or folder
    return sorted(path for path in place.glob("*.xml") if not path.name.startswith("."))


def read_voc(folder: Path, files: list[Path], report: Report) -> Rows:
    """Read VOC's XML: corners in pixels that count from 1."""
    pictures = by_stem(subfolder(folder, *IMAGES) or files[0].parent)
    for number, path in enumerate(files, 1):
        try:
            objects = voc_objects(path)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            report(number, f"{path.name} cannot be read as VOC: {error}")
            continue
        picture = pictures.get(path.stem)
        row: Row = {"objects": objects}
        if picture is None:
            report(number, f"{path.name} has no picture named {path.stem}")
            continue
        yield number, {"image": picture.relative_to(folder).as_posix(), **row}


def voc_objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects of one file. Raises ParseError, ValueError or LookupError (an unknown encoding) for what is no VOC."""
    text = path.read_bytes()
    if len(text) > MOST_XML or b"<!ENTITY" in text:
        raise ValueError("it is too large, or defines entities")
    found = []
    for item in ElementTree.fromstring(text).iter("object"):
        name, box = (item.findtext("name") or "").strip(), item.find("bndbox")
        if box is None:
            raise ValueError(f'the object "{name}" has no bndbox')
        corners = [box.findtext(side) for side in ("xmin", "ymin", "xmax", "ymax")]
        if None in corners:
            raise ValueError(f'the box of "{name}" lacks a side')
        left, top, right, bottom = (float(str(corner)) for corner in corners)
        found.append({"label": name, "box": [left - 1, top - 1, right, bottom]})
    return found


def read_yolo(folder: Path, labels: Path, report: Report) -> Rows:
    """Read YOLO's text: class, centre, width and height a line, in shares of the picture; without a file there is no object."""
    from edgelora.images import picture_size

    names, images = class_names(folder), subfolder(folder, *IMAGES)
    assert images is not None
    if not names:
        raise DataError(f"{folder} names no classes", hint="write them into classes.txt, one a line, or into data.yaml")
    for number, (stem, path) in enumerate(by_stem(images).items(), 1):
        file = labels / f"{stem}.txt"
        try:
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            width, height = picture_size(path) if lines else (0, 0)
            objects = [yolo_object(line, names, width, height) for line in lines if line.strip()]
        except (ValueError, DataError) as error:
            report(number, f"{file.name}: {error}")
            continue
        yield number, {"image": path.relative_to(folder).as_posix(), "objects": objects}


def yolo_object(line: str, names: list[str], width: int, height: int) -> dict[str, Any]:
    """Return the object of one line. Raises ValueError for what is none."""
    cells = line.split()
    if len(cells) != 5 or not cells[0].isdecimal():
        raise ValueError(f'"{line}" is no class number and four shares')
    if int(cells[0]) >= len(names):
        raise ValueError(f"class {cells[0]}, but {len(names)} are named")
    x, y, w, h = (float(cell) for cell in cells[1:])
    box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
    return {"label": names[int(cells[0])], "box": box}


def is_coco(path: Path) -> bool:
    """Tell whether a .json file begins as COCO's annotations do."""
    with path.open("rb") as file:
        return COCO.match(file.read(512).decode("utf-8", "ignore")) is not None


def read_coco(path: Path, report: Report) -> Rows:
    """Read COCO's JSON: boxes as [left, top, width, height] in pixels; crowds are left out. The pictures are beside the file,
    in images/ there, or in a folder named like the split."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        images = [(entry["id"], Path(str(entry["file_name"]))) for entry in content["images"]]
        objects: dict[Any, list[dict[str, Any]]] = {key: [] for key, _ in images}
        for entry in content["annotations"]:
            left, top, width, height = (float(value) for value in entry["bbox"])
            if not entry.get("iscrowd"):
                box = [left, top, left + width, top + height]
                objects[entry["image_id"]].append({"label": names[entry["category_id"]], "box": box})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path.name} cannot be read as COCO: {error}") from None
    except KeyError as error:
        raise DataError(f"{path.name} cannot be read as COCO: {error} is named nowhere") from None
    split = re.sub(r"^instances_|\.json$", "", path.name)
    places = [Path(name) for name in (".", "images", split, f"../{split}", f"../images/{split}", "../images")]
    for number, (key, name) in enumerate(images, 1):
        if name.is_absolute() or ".." in name.parts:
            report(number, f"{name} leaves the folder")
            continue
        place = next((place for place in places if (path.parent / place / name).is_file()), places[0])
        yield number, {"image": (place / name).as_posix(), "objects": objects[key]}
