"""Spoken digits (FSDD): the words for Whisper, the digits as labels. Two speakers train, one validates, one is held out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from training_bench.processes import python, run

from tasks_bench.entry import Missing, Places, Prepared, new_folder
from tasks_bench.texts import write_jsonl

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
        digit, speaker, take = path.stem.split("_")
        part = "train" if speaker in TRAIN else "valid" if speaker == VALID else "test" if speaker == TEST else ""
        if not part or (part == "valid" and int(take) % 2):
            continue
        shutil.copyfile(path, folder / part / "clips" / path.name)
        rows[part].append({"audio": f"clips/{path.name}", column: value(int(digit))})
    for part, found in rows.items():
        write_jsonl(folder / part / f"{part}.jsonl", found)
    away = new_folder(folder.with_name(f"{folder.name}-held-out")) / "test"
    (folder / "test").rename(away)
    return folder, away / "test.jsonl"


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
    data, test = digits(places, places.work / "rows" / "fsdd-words", "text", lambda digit: WORDS[digit])
    note = f"a window of {SECONDS} s instead of the base's 30; a speaker that training did not hear is held out"
    return Prepared(str(model), data, test, note=note, base=str(places.model("whisper")))


def classes(places: Places) -> Prepared:
    model = short_whisper(places)
    data, test = digits(places, places.work / "rows" / "fsdd-digits", "label", lambda digit: WORDS[digit])
    return Prepared(str(model), data, test, note=f"Whisper's encoder, a window of {SECONDS} s; another speaker is held out")
