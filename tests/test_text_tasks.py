"""Several labels and numbers for texts: read, learned as transformers' class learns, scored, exported, run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgelora.config import FinetuneConfig
from edgelora.data.check import scan
from edgelora.data.describe import describe, render
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.models.load import load_model
from edgelora.models.predictor import to_tensors
from edgelora.models.source import open_model
from edgelora.run.answer import run
from edgelora.tasks import get_task, guess_task
from edgelora.tasks.multi_label_classification import scores
from edgelora.tasks.text_regression import numbers
from edgelora.tokenizer import Tokenizer
from edgelora.train.finetune import finetune
from tests import tiny
from tests.test_token_classification import write
from tests.tolerances import LOGITS_FP32, METRIC

WORDS = {"heat": "hot", "light": "dim", "sound": "loud"}


def topics(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        given = [label for place, label in enumerate(WORDS) if number >> place & 1]
        rows.append({"text": f"{number // 8} " + " ".join(WORDS[label] for label in given) + ".", "labels": given})
    return rows


def lengths(count: int) -> list[dict[str, Any]]:
    return [
        {"text": "a" * (number % 7) + "b" * (7 - number % 7) + str(number // 7), "score": number % 7 / 3}
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "row", "labels"),
    [
        ("multi-label-classification", {"text": "a", "text_pair": "b", "labels": ["x"]}, ["x", "y"]),
        ("text-regression", {"text": "a", "text_pair": "b", "score": 2.5}, ["LABEL_0"]),
    ],
)
def test_the_loss_is_that_of_transformers(name: str, row: dict[str, Any], labels: list[str], tmp_path: Path) -> None:
    task = get_task(name)
    kind = str(task.config["problem_type"])
    folder = tiny.save_encoder(tmp_path / "model", "bert", labels=len(labels), problem_type=kind)
    tokenizer = Tokenizer.from_folder(folder)
    model = load_model(open_model(str(folder)), name, base_bits=32).eval()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    other = {**row, "text": "longer", "score": -1, "labels": ["x", "y"]}
    batch = to_tensors(task.collate([task.encode(r, tokenizer, labels) for r in (row, other)], tokenizer))
    loss, count = task.loss(model, batch)
    torch.testing.assert_close(loss / count, theirs(**batch).loss, **LOGITS_FP32)
    distil = tiny.save_encoder(tmp_path / "distil", "distilbert", labels=len(labels))
    assert torch.isfinite(task.loss(load_model(open_model(str(distil)), name, base_bits=32).eval(), batch)[0])


def test_which_task_rows_are_for(tmp_path: Path) -> None:
    assert guess_task(["text", "labels"]).name == "multi-label-classification"
    assert guess_task(["text", "text_pair", "score"]).name == "text-regression"
    assert guess_task(["text", "label"]).name == "text-classification"
    rows = [{"text": "a", "label": 0.5}, {"text": "b", "label": ["x"]}, {"text": " ", "label": "x"}, {"text": "c", "label": 3}]
    assert scan(str(write(tmp_path / "rows.jsonl", rows)), task=None, columns=None, valid=None).problems.lines() == [
        'rows.jsonl, line 1: "label" is a number; a name or a whole number is wanted: numbers are --task text-regression '
        "--columns score=label",
        'rows.jsonl, line 2: "label" is a list; a name or a whole number is wanted: several labels are '
        "--task multi-label-classification --columns labels=label",
        'rows.jsonl, line 3: "text" is empty',
    ]
    table = tmp_path / "table.csv"
    table.write_text('text,labels,score\na,"[""x""]",1.5\nb,x,much\nc,[1.5],nan\nd,[],1e9\n', encoding="utf-8")
    assert scan(str(table), task="multi-label-classification", columns=None, valid=None).problems.lines() == [
        'table.csv, line 3: "labels" is a text; a list of names is wanted, as JSON where the file is CSV',
        'table.csv, line 4: "labels" has a number in it; names are wanted',
    ]
    assert scan(str(table), task="text-regression", columns=None, valid=None).problems.lines() == [
        'table.csv, line 3: "score" is a text; a number is wanted',
        'table.csv, line 4: "score" is nan; a finite number is wanted',
        'table.csv, line 5: "score" is 1000000000.0; divide all of them so that they are within -100 and 100',
    ]


def test_thousands_of_labels_are_told_of_and_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    rows = [{"text": f"{number} {again}", "label": f"class {number}"} for number in range(120) for again in range(2)]
    described = describe(str(write(tmp_path / "rows.jsonl", rows)), folder, FinetuneConfig())
    assert len(described["labels"]["train"]) == 120
    render(described)
    shown = capsys.readouterr()
    assert "and 20 more labels" in shown.out + shown.err


def test_metrics_are_those_of_scikit_learn_and_scipy() -> None:
    truth, given = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[1, 0], [0, 1], [0, 1]])
    found = scores(truth, given, ["x", "y"])
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1), **METRIC)
    assert found["subset_accuracy"] == pytest.approx(1 / 3, **METRIC)
    assert found["report"]["x"]["recall"] == 0.5
    figures = numbers(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0]))
    assert figures["loss"] == pytest.approx(5 / 3, **METRIC)
    assert figures["spearman"] == pytest.approx(0.5, **METRIC)
    assert numbers(np.array([1.0, 1.0]), np.array([1.0, 3.0]))["pearson"] == 0.0


@pytest.mark.parametrize(
    ("name", "rows", "metric", "text"),
    [
        ("multi-label-classification", topics(64), "micro_f1", "5 hot loud."),
        ("text-regression", lengths(70), "pearson", "aaaaaa b"),
    ],
)
def test_the_whole_line(name: str, rows: list[dict[str, Any]], metric: str, text: str, tmp_path: Path) -> None:
    model = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    data = write(tmp_path / "rows.jsonl", rows)
    config = FinetuneConfig(precision="int8", epochs=12.0, batch_size=8, rank=4, learning_rate=1e-2)
    figures = finetune(str(model), str(data), tmp_path / "run", config)
    assert figures["valid"][metric] > 0.8
    assert export(str(tmp_path / "run"), tmp_path / "bundle", precision="int8", force=True)["verify"]["passed"]
    assert evaluate(tmp_path / "bundle", str(data))["metrics"][metric] > 0.8
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "bundle")
    assert (theirs.problem_type, theirs.num_labels) == (get_task(name).config["problem_type"], 3 if "multi" in name else 1)
    shown: list[str] = []
    answer = run(tmp_path / "bundle", [text], write=shown.append)["output"]
    if name == "text-regression":
        assert 1.0 < answer["score"] < 3.0
        assert float("".join(shown)) == pytest.approx(answer["score"], rel=1e-3)
    else:
        assert {entry["label"] for entry in answer if entry["probability"] > 0.5} == {"heat", "sound"}
