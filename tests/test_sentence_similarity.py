"""Embeddings through the whole line: the contrastive loss, rankings, the graph, `run` and the server."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from edgelora.config import FinetuneConfig
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.models.load import load_model
from edgelora.models.predictor import to_tensors
from edgelora.models.source import open_model
from edgelora.run.answer import run
from edgelora.tasks import get_task
from edgelora.tasks.ranked import ndcg, retrieval_scores
from edgelora.tokenizer import Tokenizer
from edgelora.train.finetune import finetune
from tests import tiny
from tests.serving import serving
from tests.test_token_classification import write
from tests.tolerances import LOGITS_FP32, METRIC

TASK = get_task("sentence-similarity")
ITEMS = ("red", "green", "blue", "grey", "pink", "gold")


def test_retrieval_scores() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.2, 0.1]])
    relevant = np.array([[False, False, True], [True, False, False]])
    found = retrieval_scores(scores, relevant)
    assert found["mrr"] == pytest.approx((1 / 2 + 1 / 2) / 2, **METRIC)  # a tie counts against the item
    assert (found["recall@1"], found["recall@5"]) == (0.0, 1.0)
    from sklearn.metrics import ndcg_score

    gains, guessed = np.array([[3.0, 0.0, 1.0, 2.0]]), np.array([[0.1, 0.9, 0.5, 0.4]])
    assert ndcg(guessed[0], gains[0], 3) == pytest.approx(ndcg_score(gains, guessed, k=3), **METRIC)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_embeddings_are_the_normalized_mean_of_transformers_tokens(family: str, tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path / "model", family, base_only=True)
    tokenizer = Tokenizer.from_folder(folder)
    model = load_model(open_model(str(folder)), TASK.name, base_bits=32).eval()
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    rows = [{"query": "a", "item": "red"}, {"query": "longer", "item": "red"}, {"query": "b", "item": "blue"}]
    batch = to_tensors(TASK.collate([TASK.encode(row, tokenizer, []) for row in rows], tokenizer))
    inputs = {name: tensor for name, tensor in batch.items() if not name.startswith("labels")}
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        mean = (theirs(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        wanted = torch.nn.functional.normalize(mean, dim=-1)
        torch.testing.assert_close(model.outputs(**inputs)["sentence_embedding"], wanted, **LOGITS_FP32)
        loss, count = TASK.loss(model, batch)
    scores = wanted[:3] @ wanted[3:].T / 0.05
    scores[0, 1] = scores[1, 0] = float("-inf")  # both fit "red"
    by_hand = torch.nn.functional.cross_entropy(scores, torch.arange(3), reduction="sum")
    torch.testing.assert_close(loss, by_hand, **LOGITS_FP32)
    assert count == 3


def test_the_whole_line(tmp_path: Path) -> None:
    model = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    rows = [{"query": f"{item} {item} {number}", "item": item} for number in range(16) for item in ITEMS]
    data = write(tmp_path / "rows.jsonl", rows)
    config = FinetuneConfig(precision="int8", epochs=6.0, batch_size=16, rank=8, learning_rate=1e-2)
    figures = finetune(str(model), str(data), tmp_path / "run", config)
    assert figures["valid"]["recall@1"] > 0.8
    assert export(str(tmp_path / "run"), tmp_path / "bundle", precision="int8", force=True)["verify"]["passed"]
    assert evaluate(tmp_path / "bundle", str(data))["metrics"]["recall@1"] > 0.8
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["architectures"] == ["BertModel"]
    shown: list[str] = []
    ranked = run(tmp_path / "bundle", ["blue blue 9", *ITEMS], write=shown.append)["output"]
    assert ranked[0]["item"] == "blue"
    assert "".join(shown).splitlines()[0].endswith("  blue")
    alone = run(tmp_path / "bundle", ["blue blue 9"])["output"]["embedding"]
    assert np.linalg.norm(alone) == pytest.approx(1.0, rel=1e-5)
    with serving(tmp_path / "bundle") as served:
        answer = served.post("/v1/embeddings", {"input": ["blue blue 9", "blue"], "model": "bundle"})
        assert answer["data"][0]["embedding"] == pytest.approx(alone, abs=1e-2)
        packed = served.post("/v1/embeddings", {"input": "blue", "encoding_format": "base64"})["data"][0]["embedding"]
        unpacked = np.frombuffer(base64.b64decode(packed), dtype="<f4")
        np.testing.assert_allclose(unpacked, answer["data"][1]["embedding"], atol=1e-2)
        assert answer["usage"]["prompt_tokens"] > 10
