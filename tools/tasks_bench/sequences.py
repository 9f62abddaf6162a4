"""Parallel text: a small T5 is trained here on one part of it and adapted to the other."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from training_bench.processes import ROOT, python, run

from edgelora.data.parallel import read_po
from tasks_bench.entry import Missing, Places, Prepared, new_folder, shuffled, split
from tasks_bench.texts import Row, prepared, read_e2e, write_jsonl

PRETRAIN = ROOT / "tools" / "pretrain_texts.py"
NEAR = (  # pairs of languages that are spelled nearly alike, without Serbian
    ("bs", "hr"), ("hr", "bs"), ("mk", "bg"), ("bg", "mk"), ("uk", "ru"), ("ru", "uk"), ("be", "uk"), ("cs", "sk"),
    ("sk", "cs"), ("da", "nb"), ("nb", "nn"), ("es", "es_MX"), ("pt", "pt_BR"), ("gl", "es"), ("sl", "hr"),
)  # fmt: skip
COPIED = (
    "bs", "hr", "sl", "cs", "sk", "pl", "mk", "bg", "uk", "ru", "be", "da", "nb", "nn", "sv", "de", "nl", "fr", "es", "pt",
)  # fmt: skip
LONGEST = 36  # bytes of a text


def pretrained(places: Places, name: str, family: str, rows: list[Row], minutes: float, **options: float) -> Path:
    """Return a network of a family trained here from scratch on these rows, for so many minutes; made once."""
    out = places.work / "models" / name
    if not (out / "model.safetensors").is_file():
        write_jsonl(new_folder(out) / "pretraining.jsonl", rows)
        flags = [word for option, value in {"minutes": minutes, **options}.items() for word in (f"--{option}", str(value))]
        made = run(python(str(PRETRAIN), family, str(out / "pretraining.jsonl"), str(out), *flags))
        if not made.done:
            raise Missing(f"tools/pretrain_texts.py failed: {made.message}")
    return out


def meanings(
    places: Places, family: str = "t5", minutes: float = 4.0, columns: tuple[str, str] = ("source", "target"), **options: float
) -> Prepared:
    """E2E's meanings → sentences. Those without `near` are for pretraining; the adapter learns those with it."""
    groups: dict[str, list[Row]] = {}
    for row in read_e2e(places):
        groups.setdefault(row["mr"], []).append(dict(zip(columns, (row["mr"], row["ref"]), strict=True)))
    parts = {near: [rows for mr, rows in groups.items() if ("near[" in mr) == near] for near in (False, True)}
    model = pretrained(places, f"{family}-meanings", family, [row for part in parts[False] for row in part], minutes, **options)
    cut = split(parts[True], test=50, valid=20, train=-1)
    found = {name: [row for part in parts for row in part] for name, parts in cut.items()}
    found["train"] = split(found["train"], train=1600)["train"]
    note = f"pretrained here for {minutes:g} min on meanings without `near`, adapted to those with it"
    return prepared(str(model), places.work / "rows" / f"meanings-{family}", found, note=note)


def places_in_short(places: Places, family: str, minutes: float) -> Prepared:
    """E2E's sentences → what they say in short: kind of place, food, rating, from the meaning. Split as `meanings` are."""
    rows: dict[bool, list[Row]] = {False: [], True: []}
    for row in read_e2e(places):
        said = dict(re.findall(r"(\w[\w ]*)\[(.*?)\]", row["mr"]))
        words = [said["name"] + ":", said.get("food", ""), said.get("eatType", ""), said.get("area", "")]
        short = {"source": row["ref"], "target": " ".join(filter(None, words))}
        rows["near" in said].append(short)
    model = pretrained(places, f"{family}-short", family, rows[False], minutes)
    found = split(rows[True], test=120, valid=60, train=1200)
    note = f"pretrained here for {minutes:g} min on sentences without `near`, adapted to those with it"
    return prepared(
        str(model), places.work / "rows" / f"short-{family}", found, note=note, columns="text=source,summary=target"
    )


def unpacked_catalogues(places: Places) -> Path:
    """Return the folder with the `.po` files of Django's wheel (BSD license; `pip download django --no-deps`)."""
    wheel, folder = places.source("django.whl"), places.work / "catalogues"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(new_folder(folder), [name for name in archive.namelist() if name.endswith(".po")])
    return folder


def catalogue(folder: Path, language: str) -> dict[str, str]:
    """Return Django's own short texts in a language, by their English."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob(f"locale/{language}/LC_MESSAGES/*.po")):
        for _, row in read_po(path, lambda *problem: None):
            text = str(row["target"]).strip()
            if 2 <= len(text.encode()) <= LONGEST and "\n" not in text:
                found[str(row["source"])] = text
    return found


def paired(folder: Path, first: str, second: str) -> list[Row]:
    """Return what two languages have for the same English, each source once."""
    left, right = catalogue(folder, first), catalogue(folder, second)
    found = {left[key]: right[key] for key in left if key in right}
    return [{"source": source, "target": target} for source, target in found.items()]


def scripts(places: Places) -> Prepared:
    """Django's Serbian texts in Cyrillic → in Latin letters. Pretraining copies other languages and turns one into its near."""
    minutes, folder = 12.0, unpacked_catalogues(places)
    copied = {text: None for language in COPIED for text in catalogue(folder, language).values()}
    rows: list[Row] = [{"source": text, "target": text} for text in copied]
    rows += [row for pair in NEAR for row in paired(folder, *pair)]
    options = {"vocabulary": 259, "learning-rate": 1e-3, "dropout": 0.0}
    model = pretrained(places, "t5-letters", "t5", shuffled(rows), minutes, **options)
    parts = split(paired(folder, "sr", "sr_Latn"), test=120, valid=40, train=-1)
    note = f"pretrained here for {minutes:g} min on copies and near languages, without Serbian"
    return prepared(str(model), places.work / "rows" / "scripts", parts, note=note)
