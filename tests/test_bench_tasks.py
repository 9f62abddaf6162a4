"""The benchmark of tasks: data split by seed, the commands of a row, what is kept between calls, the table and README's."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import pretrain_pictures
import readme_tasks
from tasks_bench import line, pairs, sounds, table, texts, wrong
from tasks_bench.entry import Missing, Places, split
from tasks_bench.rows import ENTRIES
from training_bench.processes import Measured
from training_bench.results import Results

from edgelora.tasks import TASKS, get_task

MACHINE = {
    "processor": "P", "architecture": "x86_64", "physical_cores": 2, "ram_mb": 24576, "commit": "abc",
    "packages": {"torch": "2.13.0"},
}  # fmt: skip
FIGURES = {"predicted_peak_mb": 400.0, "seconds": {"train": 60.0, "load": 30.0}, "table": [{"what": "base", "accuracy": 0.02}]}
SCORES = {"head": 0.7, "run": 0.9, "merged": 0.89, "bundle": 0.88}


def banking(folder: Path) -> Places:
    lines = [
        f"text {number} of {label},{label}" for number in range(20) for label in ("card_arrival", "top_up", "exchange_rate")
    ]
    lines += [f"more {number},card_arrival" for number in range(3000)]
    (folder / "banking77.csv").write_text("text,category\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return Places(folder, folder / "models", folder / "work")


def faked(calls: list[list[str]]) -> Any:
    """Return a runner that notes commands and answers as `edgelora` does."""

    def run(command: list[str], **_: Any) -> Measured:
        words = command[command.index("edgelora") + 1 :]
        calls.append(words)
        out = Path(words[words.index("-o") + 1]) if "-o" in words else None
        if out is not None:
            (out / "data").mkdir(parents=True)
        result: dict[str, Any] = {}
        if words[0] == "finetune" and out is not None:
            (out / "data" / "prepared.json").write_text('{"rows": {"train": 7}}', encoding="utf-8")
            save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, out / "adapter_model.safetensors")
            result = FIGURES
        if words[0] == "evaluate":
            result = {"rows": 9, "metrics": {"accuracy": SCORES[Path(words[1]).name]}}
        if words[0] == "bench":
            result = {"precision": "int4", "size_mb": 20.8, "ms_per_input": 3.25}
        return Measured(command, 0, 1.0, 500.0, 500.0, None, 0.0, "", result)

    return run


def test_every_task_of_texts_has_a_row_and_every_row_a_metric_of_its_task() -> None:
    assert {entry.task for entry in ENTRIES} <= set(TASKS)
    assert [entry.name for entry in ENTRIES if entry.metric not in (*get_task(entry.task).metrics, "bleu")] == []
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_splits_are_the_same_every_time_and_apart() -> None:
    found = split(range(100), test=20, valid=10, train=-1)
    assert found == split(range(100), test=20, valid=10, train=-1)
    assert sorted(item for part in found.values() for item in part) == list(range(100))
    assert found["test"] != list(range(20))


def test_the_held_out_rows_are_not_in_data(tmp_path: Path) -> None:
    prepared = texts.banking(banking(tmp_path))
    assert {path.name for path in prepared.data.iterdir()} == {"train.jsonl", "valid.jsonl"}
    assert prepared.columns == "label=category"
    kept = {path.name: set(path.read_text(encoding="utf-8").splitlines()) for path in (prepared.test, *prepared.data.iterdir())}
    assert not kept["test.jsonl"] & kept["train.jsonl"]
    with pytest.raises(Missing, match="e2e_nlg"):
        texts.ratings(banking(tmp_path))


def test_candidates_have_one_that_fits(tmp_path: Path) -> None:
    rows = [json.loads(text) for text in texts.ranking(banking(tmp_path)).test.read_text(encoding="utf-8").splitlines()]
    first = [row for row in rows if row["query"] == rows[0]["query"]]
    assert [row["relevance"] for row in first].count(1) == 1


def test_blobs_overlap_and_their_boxes_are_in_the_picture() -> None:
    random = np.random.default_rng(0)
    found = [pretrain_pictures.blobs(random, 64) for _ in range(20)]
    objects = [entry for _, _, part in found for entry in part]
    assert {entry["label"] for entry in objects} == set(pretrain_pictures.BLOBS)
    boxes = np.array([entry["box"] for entry in objects])
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (int(boxes.min()), int(boxes.max())) == (0, 64)  # some leave the picture, none of their boxes does
    rings = [np.array([e["box"] for e in part if e["label"] == "ring"]) for _, _, part in found]
    shared = [np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) for part in rings for a, b in combinations(part, 2)]
    assert any((sides > 2).all() for sides in shared)


def test_a_picture_has_its_class_in_words_and_no_picture_is_in_two_parts(tmp_path: Path) -> None:
    pixels = np.stack([np.full((28, 28), 10 * kind + row, np.uint8) for row in range(5) for kind in range(10)])
    known = pixels, np.arange(50) % 10
    for part, first, count in (("train", 0, 3), ("valid", 3, 2)):
        pairs.write(tmp_path, part, pairs.singles(known, (3, 7), first, count))
    seen = []
    for part in ("train", "valid"):
        for text in (tmp_path / part / f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(text)
            seen.append(int(np.asarray(Image.open(tmp_path / part / row["image"])).max()))
            assert row["text"] == f"a picture of a {pairs.KINDS[seen[-1] // 10]}"
    assert len(seen) == len(set(seen)) == 10


def test_a_picture_of_two_says_which_is_left() -> None:
    known = np.stack([np.full((28, 28), 20 * kind + 20, np.uint8) for kind in range(10)]), np.arange(10)
    found = list(pairs.couples(known, (3, 7), 0, 2))
    assert len(found) == 2 * 2 * 2
    for picture, text in found:
        shown = np.asarray(picture)
        left, right = (int(shown[:, half].max()) // 20 - 1 for half in (slice(0, 32), slice(32, 64)))
        assert text == f"a {pairs.KINDS[left]} left of a {pairs.KINDS[right]}"


def test_the_speaker_that_is_adapted_to_is_not_pretrained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fsdd").mkdir()
    for digit in range(10):
        for speaker in ("george", sounds.TEST):
            for take in range(10):
                (tmp_path / "fsdd" / f"{digit}_{speaker}_{take}.wav").write_bytes(b"")
    monkeypatch.setattr(sounds, "made_by", lambda *_, **__: tmp_path / "model")
    found = sounds.spelled(Places(tmp_path, tmp_path / "models", tmp_path / "work"))
    first = tmp_path / "work" / "rows" / "fsdd-letters-wav2vec2-first" / "train" / "train.jsonl"
    assert sounds.TEST not in first.read_text(encoding="utf-8")
    names = [
        set(path.read_text(encoding="utf-8").splitlines())
        for path in (found.data / "train" / "train.jsonl", found.data / "valid" / "valid.jsonl", found.test)
    ]
    assert [len(part) for part in names] == [50, 10, 40]
    assert len(set.union(*names)) == 100


def test_a_row_goes_the_whole_line_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(line, "run", faked(calls))
    entry = replace(ENTRIES[0], rows=50)
    places, results = banking(tmp_path), Results(tmp_path / "results.json", MACHINE)
    rows: list[dict[str, Any]] = []
    line.measure(entry, places, results, 2, rows.append)
    assert rows[0] == {**rows[1], "head": None}
    row = rows[1]
    verbs = [words[0] for words in calls]
    assert verbs == ["finetune", "evaluate", "merge", "evaluate", "export", "evaluate", "bench", "finetune", "evaluate"]
    assert calls[7][calls[7].index("--target-modules") + 1] == "none"
    assert all("--columns" in words for words in calls if words[0] in ("finetune", "evaluate"))
    assert [row[name] for name in ("base", "head", "adapter", "merged", "bundle")] == [0.02, 0.7, 0.9, 0.89, 0.88]
    assert (row["trained"], row["rows"], row["test_rows"], row["minutes"]) == (17, 7, 9, 1.5)
    results.part(f"{table.PART}{entry.name}", row)
    line.measure(entry, places, Results(tmp_path / "results.json", MACHINE), 2, rows.append)
    assert len(calls) == len(verbs)  # nothing is measured twice
    shown = table.shown(table.collected([tmp_path / "results.json"])[entry.name])
    assert (shown["peak MB"], shown["head only"], shown["ms"]) == ("500 (400)", "0.700", "3.2")
    condensed = readme_tasks.condense([tmp_path / "results.json"], {})
    worth, took = readme_tasks.tables(condensed["rows"])
    assert (worth[0]["bundle"], took[0]["trained parameters"]) == (0.88, "17")
    assert "2 cores of P" in condensed["machine"]
    made = [{**row, "note": f"{readme_tasks.MADE} first"} for row in condensed["rows"] * 2]
    assert [len(rows) for _, rows in readme_tasks.groups([*condensed["rows"], *made])] == [1, 2]
    assert readme_tasks.notes([*condensed["rows"], *made]) == {f"{readme_tasks.MADE} first": [entry.name] * 2}
    with pytest.raises(SystemExit, match="other rows"):
        readme_tasks.condense([tmp_path / "results.json"], {"machine": "another", "rows": []})


def test_a_command_that_fails_ends_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Measured([], 2, 1.0, 0.0, 0.0, None, 0.0, "error: no such file", {})
    monkeypatch.setattr(line, "run", lambda *_, **__: failed)
    with pytest.raises(line.Failed, match="edgelora finetune: error: no such file"):
        line.measure(ENTRIES[0], banking(tmp_path), Results(tmp_path / "results.json", MACHINE), 2, print)


def test_wrong_inputs_name_tasks_that_exist_and_can_be_made(tmp_path: Path) -> None:
    for number, case in enumerate(wrong.CASES):
        assert case.task in TASKS
        (tmp_path / str(number)).mkdir()
        assert case.make(tmp_path / str(number)).exists()
