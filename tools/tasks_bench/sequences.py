"""Parallel text: a small T5 is trained here on one part of it and adapted to the other."""

from __future__ import annotations

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


def pretrained(places: Places, name: str, rows: list[Row], minutes: float, **options: float) -> Path:
    """Return a T5 trained here from scratch on these rows, for so many minutes; made once."""
    out = places.work / "models" / name
    if not (out / "model.safetensors").is_file():
        write_jsonl(new_folder(out) / "pretraining.jsonl", rows)
        flags = [word for option, value in {"minutes": minutes, **options}.items() for word in (f"--{option}", str(value))]
        made = run(python(str(PRETRAIN), str(out / "pretraining.jsonl"), str(out), *flags))
        if not made.done:
            raise Missing(f"tools/pretrain_texts.py failed: {made.message}")
    return out


def meanings(places: Places) -> Prepared:
    """E2E's meanings → sentences: those without `near[…]` are for pretraining, those with it for the adapter."""
    minutes = 4.0
    rows = [{"source": row["mr"], "target": row["ref"]} for row in read_e2e(places)]
    near = [row for row in rows if "near[" in row["source"]]
    model = pretrained(places, "t5-meanings", [row for row in rows if "near[" not in row["source"]], minutes)
    groups: dict[str, list[Row]] = {}
    for row in near:
        groups.setdefault(row["source"], []).append(row)
    parts = split(list(groups.values()), test=60, valid=20, train=-1)
    found = {name: [row for group in part for row in group] for name, part in parts.items()}
    found["train"] = split(found["train"], train=1600)["train"]
    note = f"pretrained here for {minutes:g} min on meanings without `near`, adapted to those with it"
    return prepared(str(model), places.work / "rows" / "meanings", found, note=note)


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
    model = pretrained(places, "t5-letters", shuffled(rows), minutes, **options)
    parts = split(paired(folder, "sr", "sr_Latn"), test=120, valid=40, train=-1)
    note = f"pretrained here for {minutes:g} min on copies and near languages, without Serbian"
    return prepared(str(model), places.work / "rows" / "scripts", parts, note=note)
