"""Rankings by a cross-encoder through the whole line: rows of a query together, the loss, the metrics, `run` and the server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from edgelora.config import FinetuneConfig
from edgelora.data.check import scan
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.models.load import load_model
from edgelora.models.predictor import to_tensors
from edgelora.models.source import open_model
from edgelora.run.answer import run
from edgelora.tasks import get_task, guess_task
from edgelora.tasks.base import Row
from edgelora.tasks.ranked import candidate_scores
from edgelora.tokenizer import Tokenizer
from edgelora.train.finetune import finetune
from tests import tiny
from tests.serving import serving
from tests.test_token_classification import write
from tests.tolerances import LOGITS_FP32, METRIC

TASK = get_task("text-ranking")
ITEMS = ("red", "green", "blue", "grey", "pink", "gold")


def candidates(count: int) -> list[Row]:
    """Queries with four candidates each, of which the blue one fits, a green one half."""
    offered = [[ITEMS[(number + step) % len(ITEMS)] for step in range(4)] for number in range(count)]
    worth = {"blue": 1, "green": 0.5}
    return [
        {"query": f"number {number}", "item": item, "relevance": worth.get(item, 0)}
        for number, items in enumerate(offered)
        for item in items
    ]


def test_the_metrics_are_those_of_scikit_learn_and_of_hand() -> None:
    from sklearn.metrics import ndcg_score

    queries, scores = ["a"] * 4 + ["b"] * 2 + ["c"] * 2, np.array([0.9, 0.3, 0.8, 0.1, 0.5, 0.5, 0.2, 0.1])
    relevance = np.array([0.0, 1.0, 0.5, 0.0, 1.0, 0.0, 0.0, 0.0])
    found = candidate_scores(queries, scores, relevance)
    ndcg_a = ndcg_score([relevance[:4]], [scores[:4]])
    assert found["ndcg@10"] == pytest.approx((ndcg_a + 1 / np.log2(3)) / 2, **METRIC)  # a tie counts against the item
    assert found["mrr"] == pytest.approx((1 / 2 + 1 / 2) / 2, **METRIC)  # nothing fits "c": it is left out
    assert (found["recall@1"], found["recall@5"]) == (0.0, 1.0)
    assert candidate_scores(["c", "c"], scores[:2], np.zeros(2))["mrr"] == 0.0


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path / "model", "bert", labels=1, problem_type=str(TASK.config["problem_type"]))
    tokenizer = Tokenizer.from_folder(folder)
    model = load_model(open_model(str(folder)), TASK.name, base_bits=32).eval()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = to_tensors(TASK.collate([TASK.encode(row, tokenizer, []) for row in candidates(2)], tokenizer))
    loss, count = TASK.loss(model, batch)
    wanted = theirs(**{**batch, "labels": batch["labels"][:, None]}).loss
    torch.testing.assert_close(loss / count, wanted, **LOGITS_FP32)


def test_the_rows_of_a_query_stay_together(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", candidates(60))
    assert guess_task(["query", "item", "relevance"]).name == "text-ranking"
    found = scan(str(data), task=None, columns=None, valid="0.2")
    sides: dict[str, set[bool]] = {}
    for (_, _, row), value in zip(found.rows("train"), found.hashes["train"], strict=True):
        sides.setdefault(row["query"], set()).add(value in found.valid)
    assert all(len(side) == 1 for side in sides.values())
    assert sum(side == {True} for side in sides.values()) == 12


def test_what_is_wrong_with_rows(tmp_path: Path) -> None:
    rows = [{"query": "a", "item": "b", "relevance": value} for value in (3, "high", True)] + [{"query": "a", "item": " "}]
    assert scan(str(write(tmp_path / "rows.jsonl", rows)), task=None, columns=None, valid=None).problems.lines() == [
        'rows.jsonl, line 1: "relevance" is 3; divide all of them by the largest: 0 to 1 is wanted',
        'rows.jsonl, line 2: "relevance" is a text; a number from 0 to 1 is wanted',
        'rows.jsonl, line 4: "item" is empty',
        'rows.jsonl, line 4: "relevance" is missing; a number from 0 to 1 is wanted',
    ]


def test_the_whole_line(tmp_path: Path) -> None:
    model = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    data = write(tmp_path / "rows.jsonl", candidates(60))
    config = FinetuneConfig(precision="int8", epochs=6.0, batch_size=16, rank=8, learning_rate=1e-2, valid_rows=18)
    figures = finetune(str(model), str(data), tmp_path / "run", config)
    assert figures["valid"]["recall@5"] == 1.0
    assert figures["valid"]["ndcg@10"] > 0.9
    assert export(str(tmp_path / "run"), tmp_path / "bundle", precision="int8", force=True)["verify"]["passed"]
    assert evaluate(tmp_path / "bundle", str(data))["metrics"]["ndcg@10"] > 0.9
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "bundle")
    assert (theirs.problem_type, theirs.num_labels) == ("multi_label_classification", 1)
    shown: list[str] = []
    ranked = run(tmp_path / "bundle", ["number 7", *ITEMS], write=shown.append)["output"]
    assert ranked[0]["item"] == "blue"
    assert ranked[0]["score"] > 0.5 > ranked[-1]["score"]
    assert "".join(shown).splitlines()[0].endswith("  blue")
    asked = json.dumps({"query": "number 7", "items": list(ITEMS)})
    assert run(tmp_path / "bundle", [asked])["output"] == ranked
    with serving(tmp_path / "bundle") as served:
        answer = served.post("/v1/classify", {"input": {"query": "number 7", "items": list(ITEMS)}})
        assert answer["data"][0]["item"] == "blue"
