"""Spoken digits (FSDD): the words for Whisper, the digits as labels. Two speakers train, one validates, one is held out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from training_bench.processes import ROOT, python, run

from tasks_bench.entry import Missing, Places, Prepared, new_folder, shuffled
from tasks_bench.pictures import held_out, made_by
from tasks_bench.texts import write_jsonl

PRETRAIN = ROOT / "tools" / "pretrain_pairs.py"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN, VALID, TEST = ("jackson", "lucas"), "george", "yweweler"
SECONDS = 2  # the window: the longest digit takes 1.1 s


def digits(places: Places, folder: Path, column: str, value: Callable[[int], str]) -> tuple[Path, Path]:
    """Write manifests with `column`; return DATA and the held-out rows. Validation takes half of its speaker's recordings."""
    source, rows = places.source("fsdd"), {"train": [], "valid": [], "test": []}  # type: ignore[var-annotated]
    new_folder(folder)
    for part in rows:
        (folder / part / "clips").mkdir(parents=True)
    for path in sorted(source.glob("*.wav")):
        said, who, take = path.stem.split("_")
        part = "train" if who in TRAIN else "valid" if who == VALID else "test" if who == TEST else ""
        if not part or (part == "valid" and int(take) % 2):
            continue
        shutil.copyfile(path, folder / part / "clips" / path.name)
        rows[part].append({"audio": f"clips/{path.name}", column: value(int(said))})
    for part, found in rows.items():
        write_jsonl(folder / part / f"{part}.jsonl", found)
    return folder, held_out(folder) / "test.jsonl"


def short_whisper(places: Places) -> Path:
    """Return Whisper tiny.en with a window of SECONDS, made once by edgelora.models.window."""
    out = places.work / "models" / f"whisper-{SECONDS}s"
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        made = run(python("-m", "edgelora.models.window", str(places.model("whisper")), str(SECONDS), str(out)))
        if not made.done:
            raise Missing(f"edgelora.models.window failed: {made.message}")
    return out


def words(places: Places) -> Prepared:
    model = short_whisper(places)
    data, test = digits(places, places.work / "rows" / "fsdd-words", "text", WORDS.__getitem__)
    note = f"a window of {SECONDS} s instead of the base's 30; a speaker that training did not hear is held out"
    return Prepared(str(model), data, test, note=note, base=str(places.model("whisper")))


def classes(places: Places) -> Prepared:
    model = short_whisper(places)
    data, test = digits(places, places.work / "rows" / "fsdd-digits", "label", WORDS.__getitem__)
    return Prepared(str(model), data, test, note=f"Whisper's encoder, a window of {SECONDS} s; another speaker is held out")


def spelled(places: Places, family: str = "wav2vec2") -> Prepared:
    """A small network is trained here on three speakers and adapted to the fourth, whose other recordings are held out."""
    minutes, folder = 5.0, places.work / "rows" / f"fsdd-letters-{family}"
    first = folder.with_name(f"{folder.name}-first")
    recordings = sorted(places.source("fsdd").glob("*.wav"))
    own = shuffled([path for path in recordings if speaker(path) == TEST])
    others = [path for path in recordings if speaker(path) != TEST]
    manifest(others, new_folder(first), "train")
    new_folder(folder)
    for name, paths in {"train": own[:50], "valid": own[50:60], "test": own[60:]}.items():
        manifest(paths, folder, name)
    rows = first / "train" / "train.jsonl"
    model = made_by(PRETRAIN, places, f"{family}-digits", (family, rows), "--minutes", minutes)
    note = f"pretrained here for {minutes:g} min on three speakers ({len(others)} recordings), adapted to 50 of the fourth"
    return Prepared(str(model), folder, held_out(folder) / "test.jsonl", note=note)


def halves(places: Places, family: str, minutes: float = 3.0) -> Prepared:
    """A small network is trained here on the digits from zero to four, and adapted to the others; all speakers are in both."""
    folder = places.work / "rows" / f"fsdd-{family}"
    first = folder.with_name(f"{folder.name}-first")
    recordings = shuffled(sorted(places.source("fsdd").glob("*.wav")))
    low, high = ([path for path in recordings if (digit(path) < 5) == early] for early in (True, False))
    manifest(low, new_folder(first), "train", "label")
    new_folder(folder)
    for name, paths in {"test": high[:60], "valid": high[60:80], "train": high[80:]}.items():
        manifest(paths, folder, name, "label")
    rows = first / "train" / "train.jsonl"
    model = made_by(PRETRAIN, places, f"{family}-low", (family, rows), "--minutes", minutes)
    note = f"pretrained here for {minutes:g} min on the digits zero to four ({len(low)} recordings), adapted to the other five"
    return Prepared(str(model), folder, held_out(folder) / "test.jsonl", note=note)


def digit(path: Path) -> int:
    return int(path.stem.split("_")[0])


def speaker(path: Path) -> str:
    return path.stem.split("_")[1]


def manifest(paths: list[Path], folder: Path, part: str, column: str = "text") -> None:
    """Write FOLDER/PART/PART.jsonl with the recordings beside it, each with the word of its digit."""
    (folder / part / "clips").mkdir(parents=True)
    for path in paths:
        shutil.copyfile(path, folder / part / "clips" / path.name)
    rows = [{"audio": f"clips/{path.name}", column: WORDS[digit(path)]} for path in paths]
    write_jsonl(folder / part / f"{part}.jsonl", rows)
