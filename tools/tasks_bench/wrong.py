"""What each task says to rows that are wrong: small files are made, and `edgelora data` is asked about them as a user would."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from training_bench.processes import child_environment, python

from tasks_bench.entry import new_folder
from tasks_bench.texts import MINILM, write_jsonl

PICTURES = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
SOUNDS = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000}
PROGRESS = re.compile(r"(reading rows|encoding).*")
SIDE, RATE = 64, 44100
MANY = 4000


@dataclass(frozen=True)
class Case:
    """One wrong input: `make` writes DATA into a folder; `processor` is what reads it."""

    task: str
    wrong: str
    make: Callable[[Path], Path]
    processor: dict[str, Any] | None = None


def rows_of(*rows: dict[str, Any]) -> Callable[[Path], Path]:
    """Return a maker of a JSONL file: these rows, the first of them wrong, and more like the last."""

    def make(folder: Path) -> Path:
        write_jsonl(folder / "rows.jsonl", [*rows, *(another(rows[-1], number) for number in range(3))])
        return folder / "rows.jsonl"

    return make


def another(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a row like another, told apart by its text."""
    return {name: f"{value} {number}" if name in ("text", "query", "source") else value for name, value in row.items()}


def picture(path: Path, *, side: int = SIDE, values: Any = None) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (side, side, 3), dtype=np.uint8) if values is None else values
    Image.fromarray(pixels).save(path)


def cut_picture(folder: Path) -> Path:
    for kind in ("cat", "dog"):
        for number in range(3):
            picture(folder / kind / f"{number}.png")
    broken = folder / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (folder / "dog" / "2.png").write_text("no picture at all", encoding="utf-8")
    return folder


def areas(folder: Path, *, side: int = SIDE, highest: int = 1, colours: bool = False) -> Path:
    for number in range(4):
        picture(folder / "images" / f"{number}.png")
        size = side if number == 1 else SIDE
        mask = np.zeros((size, size, 3) if colours and number == 1 else (size, size), np.uint8)
        mask[: size // 2] = (200, 30, 30) if mask.ndim == 3 else highest if number == 1 else 1
        picture(folder / "masks" / f"{number}.png", values=mask)
    if highest > 1:
        (folder / "classes.txt").write_text("ground\nwall\n", encoding="utf-8")
    return folder


def boxes(*box: float, label: str = "cell") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for number in range(4):
            picture(folder / f"{number}.png")
        good = {"label": "cell", "box": [4, 4, 20, 20]}
        rows = [{"image": f"{number}.png", "objects": [good]} for number in range(4)]
        rows[1]["objects"] = [good, {"label": label, "box": list(box)}]
        write_jsonl(folder / "rows.jsonl", rows)
        return folder / "rows.jsonl"

    return make


def sounds(channels: int, *, seconds: float = 0.5, broken: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import soundfile

        for number in range(6):
            path = folder / ("yes" if number % 2 else "no") / f"{number}.wav"
            path.parent.mkdir(exist_ok=True)
            noise = np.random.default_rng(number).standard_normal((round(RATE * seconds), channels)) * 0.1
            soundfile.write(path, noise, RATE)
        if broken:
            (folder / "yes" / "1.wav").write_bytes(b"RIFF and then nothing")
        return folder

    return make


def many_classes(folder: Path) -> Path:
    lines = [f"{question} item {number},class {number}" for number in range(MANY) for question in ("where is", "what is")]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder / "rows.csv"


GOOD = {"text": "my card has not arrived", "label": "card"}
QUESTION = {"question": "Who?", "context": "Ann is here.", "answers": [{"text": "Ann", "answer_start": 0}]}
CASES = (
    Case("text-classification", "empty text", rows_of({"text": " ", "label": "card"}, GOOD, {**GOOD, "label": "fee"})),
    Case("text-classification", "labels of mixed types", rows_of({**GOOD, "label": 3}, GOOD, {**GOOD, "label": "fee"})),
    Case("text-classification", f"a CSV of {MANY:,} classes, two rows each", many_classes),
    Case("text-classification", "one label in all rows", rows_of(GOOD)),
    Case(
        "multi-label-classification", "labels that are no list",
        rows_of({"text": "a", "labels": "x"}, {"text": "b", "labels": ["x"]}),
    ),
    Case("text-regression", "a score that is text", rows_of({"text": "a", "score": "much"}, {"text": "b", "score": 1})),
    Case(
        "text-ranking", "a relevance of 3",
        rows_of({"query": "a", "item": "b", "relevance": 3}, {"query": "a", "item": "c", "relevance": 0}),
    ),
    Case("sentence-similarity", "an item that is missing", rows_of({"query": "a", "item": None}, {"query": "b", "item": "c"})),
    Case(
        "token-classification", "a span outside of the text",
        rows_of({"text": "Ann", "spans": [{"start": 0, "end": 9, "label": "x"}]}, {"text": "Ann", "spans": []}),
    ),
    Case(
        "question-answering", "an answer that is not where it is said to be",
        rows_of({**QUESTION, "answers": [{"text": "Bob", "answer_start": 0}]}, QUESTION),
    ),
    Case("translation", "no target", rows_of({"source": "yes", "target": ""}, {"source": "no", "target": "nein"})),
    Case(
        "text-generation", "a chat without an answer",
        rows_of({"messages": [{"role": "user", "content": "hi"}]}, {"messages": [{"role": "assistant", "content": "hi"}]}),
    ),
    Case("image-classification", "a picture that is cut off, one that is none", cut_picture, PICTURES),
    Case("image-segmentation", "a mask of another size", lambda folder: areas(folder, side=SIDE // 2), PICTURES),
    Case("image-segmentation", "a mask with a value that is no class", lambda folder: areas(folder, highest=7), PICTURES),
    Case("image-segmentation", "a mask in colours", lambda folder: areas(folder, colours=True), PICTURES),
    Case("object-detection", "a box outside of the picture", boxes(50, 50, 90, 60), PICTURES),
    Case("object-detection", "a box without an inside", boxes(20, 20, 10, 30), PICTURES),
    Case("audio-classification", "stereo at 44.1 kHz", sounds(2), SOUNDS),
    Case("audio-classification", "a file that is no sound", sounds(1, broken=True), SOUNDS),
    Case("audio-classification", "empty recordings", sounds(1, seconds=0), SOUNDS),
)  # fmt: skip


def answers(work: Path) -> list[dict[str, object]]:
    """Return a row for each case: the task, what is wrong, the exit code, and what `edgelora data` printed."""
    found: list[dict[str, object]] = []
    for number, case in enumerate(CASES):
        folder = new_folder(work / "wrong" / str(number))
        code, text = ask(case, case.make(folder), work / "wrong" / "model")
        found.append({"task": case.task, "wrong": case.wrong, "exit": code, "printed": text.replace("|", "/")})
    return found


def ask(case: Case, data: Path, model: Path) -> tuple[int, str]:
    """Return the exit code and what was said; of rows that are taken the warnings, and the first row as the model sees it."""
    reader = ["--model", MINILM] if case.task in ("text-classification",) else []
    if case.processor is not None:
        reader = ["--model", str(processor_only(model, case.processor))]
    command = python("-m", "edgelora", "data", str(data), "--task", case.task, *reader, "--json", "--quiet")
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not PROGRESS.fullmatch(line.strip())]
    if done.returncode == 0:
        result = json.loads(done.stdout)
        lines = [line for line in lines if line.startswith("warning")]
        lines.append(f"taken: {result['splits']['train']['rows']} rows; the first: {result['first_rows'][0]}")
    return done.returncode, " ↵ ".join(line.replace(f"{data.parent}/", "") for line in lines)


def processor_only(folder: Path, content: dict[str, Any]) -> Path:
    """Return a model's folder of which rows need nothing but the preprocessor."""
    from safetensors.numpy import save_file

    new_folder(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")
    save_file({"none": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder
