"""Parallel text: a small T5 is trained here on one part of it and adapted to the other."""

from __future__ import annotations

import contextlib
import gettext
from pathlib import Path

from training_bench.processes import ROOT, python, run

from tasks_bench.entry import Missing, Places, Prepared, new_folder, split
from tasks_bench.texts import Row, prepared, read_e2e, write_jsonl

PRETRAIN = ROOT / "tools" / "pretrain_texts.py"
LANGUAGE = "German"
OWN = "iso_639-3"  # the catalogue that is adapted to: names of languages
BYTES = 259  # of a vocabulary without any longer piece: 256, and three special tokens
LONGEST = 60  # characters: longer texts are no names, and slow what is pretrained


def pretrained(places: Places, name: str, rows: list[Row], minutes: float, vocabulary: int = 4000) -> Path:
    """Return a T5 with so many tokens, trained here from scratch on these rows, for so many minutes; made once."""
    out = places.work / "models" / name
    if not (out / "model.safetensors").is_file():
        write_jsonl(new_folder(out) / "pretraining.jsonl", rows)
        options = ("--minutes", str(minutes), "--vocabulary", str(vocabulary))
        made = run(python(str(PRETRAIN), str(out / "pretraining.jsonl"), str(out), *options))
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


def catalogues(places: Places) -> Prepared:
    """iso-codes' catalogues, English → German: names of languages are adapted to, others are for pretraining.

    Single bytes are the tokens: most of a name is copied, and endings change.
    """
    minutes, folder = 6.0, places.extra.get("catalogues", Path("/usr/share/locale/de/LC_MESSAGES"))
    files = sorted(path for path in folder.glob("iso_*.mo") if not path.is_symlink())  # other names of the same catalogue
    own = [path for path in files if path.stem == OWN]
    if not own or len(files) < 5:
        raise Missing(f"no {OWN}.mo beside others in {folder}: apt install iso-codes, or --extra catalogues=FOLDER")
    others = [row for path in files if path.stem != OWN for row in read_catalogue(path)]
    model = pretrained(places, "t5-names", others, minutes, BYTES)
    known = {row["source"] for row in others}
    rows = [row for row in read_catalogue(own[0]) if row["source"] not in known]
    note = f"pretrained here for {minutes:g} min on {len(others):,} names of places, scripts, coins and groups of languages"
    return prepared(str(model), places.work / "rows" / "catalogues", split(rows, test=300, valid=60, train=2000), note=note)


def read_catalogue(path: Path) -> list[Row]:
    """Return the translated texts of a compiled catalogue, short ones without plural forms."""
    pairs: list[tuple[str, str]] = []
    with path.open("rb") as file, contextlib.suppress(UnicodeDecodeError):  # some headers are in Latin-1
        found = gettext.GNUTranslations(file)._catalog.items()  # type: ignore[attr-defined]  # no other way to list it
        pairs = [(source.rpartition("\x04")[2], target) for source, target in found if isinstance(source, str) and source]
    return [
        {"source": source, "target": target}
        for source, target in dict(pairs).items()
        if source.strip() and target.strip() and len(source) <= LONGEST and len(target) <= LONGEST
    ]
