"""Spans and tags through the whole line: read, aligned, learned as transformers' classes learn, scored, exported, run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgelora.config import FinetuneConfig
from edgelora.data.check import scan
from edgelora.errors import DataError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.models.load import load_model
from edgelora.models.predictor import to_tensors
from edgelora.models.source import open_model
from edgelora.run.answer import run
from edgelora.run.classify import Classifier
from edgelora.run.model import load
from edgelora.tasks import get_task, guess_task
from edgelora.tasks.spans import spans_of_tags, text_of
from edgelora.tasks.tagged import span_scores, tags_of_spans
from edgelora.tokenizer import Tokenizer
from edgelora.train.finetune import finetune
from tests import tiny
from tests.tolerances import ENCODER_FP32, LOGITS_FP32, METRIC

TASK = get_task("token-classification")
LABELS = ["O", "B-name", "I-name", "B-time", "I-time"]


def named_rows(count: int) -> list[dict[str, Any]]:
    """Rows whose spans are easy to find: names are in capitals, times are numbers."""
    rows = []
    for number in range(count):
        name, time = ("ANN", "BOB", "EVE DO")[number % 3], f"{number % 12}:{number % 6}0"
        text = f"{('met', 'call')[number % 2]} {name} at {time}!"
        spans = [(text.index(name), "name", name), (text.index(time), "time", time)]
        given = [{"start": start, "end": start + len(found), "label": label} for start, label, found in spans]
        rows.append({"text": text, "spans": given})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("tags", ["B-a I-a O B-b", "I-a I-a O I-b", "B-a E-a O S-b", "B-a L-a O U-b"])
def test_all_schemes_say_the_same_spans(tags: str) -> None:
    words = [(0, 2), (3, 5), (6, 7), (8, 9)]
    assert spans_of_tags(tags.split(), words) == [(0, 5, "a"), (8, 9, "b")]
    assert tags_of_spans([(0, 5, "a"), (8, 9, "b")], words) == ["B-a", "I-a", "O", "B-b"]
    assert spans_of_tags(["NN", "NN", "", "I-b"], words) == [(0, 2, "NN"), (3, 5, "NN"), (8, 9, "b")]


def test_words_of_any_script() -> None:
    text, words = text_of({"text": "It's 5pm, 東京へ naïve_x."})
    assert [text[start:end] for start, end in words] == ["It", "'", "s", "5pm", ",", "東", "京", "へ", "naïve_x", "."]
    assert text_of({"tokens": ["It", "'s", "a b"]}) == ("It 's a b", [(0, 2), (3, 5), (6, 9)])


def test_first_sub_words_are_tagged(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    row = {"tokens": ["Ann", "é", "left"], "tags": ["B-name", "I-name", "O"]}
    example = TASK.encode(row, tokenizer, LABELS)
    # One token for each byte: "Ann é left" has 11.
    assert example.arrays["tags"].tolist() == [1, -1, -1, -1, 2, -1, -1, 0, -1, -1, -1]
    assert [tuple(place) for place in example.arrays["places"] if place[0] >= 0] == [(0, 3), (4, 5), (6, 10)]
    batch = TASK.collate([example, TASK.truncate(example, 5)], tokenizer)
    assert batch["labels"][0, :5].tolist() == [1, -100, -100, -100, 2]
    assert batch["labels"][1].tolist() == [1, -100, -100, -100, -100] + [-100] * 6
    assert (TASK.encode({"text": "Ann left"}, tokenizer, LABELS).arrays["tags"] == -1).all()


def test_what_is_wrong_with_rows(tmp_path: Path) -> None:
    rows = [
        {"text": "Ann met Bob", "spans": [[0, 3, "name"], [8, 11, "name"]]},
        {"text": "Ann met Bob", "spans": [[0, 6, "name"], {"start": 4, "end": 11, "label": "name"}]},
        {"text": "Ann", "spans": [{"start": 1, "end": 9, "label": "name"}]},
        {"text": "Ann", "spans": [{"start": "0", "end": 3, "label": "name"}]},
        {"text": "Ann  met", "spans": [{"start": 3, "end": 5, "label": "name"}, {"start": 0, "end": 3, "label": None}]},
        {"text": "", "spans": []},
        {"text": "Ann", "spans": "x"},
        {"tokens": ["a", ""], "tags": ["O", "O"]},
        {"tokens": ["a"], "tags": ["O", "O"]},
        {"tokens": ["a"], "tags": [3]},
    ]
    found = scan(str(write(tmp_path / "rows.jsonl", rows)), task=None, columns=None, valid=None).problems.lines()
    assert found == [
        'rows.jsonl, line 2: spans overlap: 0 to 6 ("Ann me", name) and 4 to 11 ("met Bob", name)',
        "rows.jsonl, line 3: span 1 is from 1 to 9; the text has 3 characters",
        'rows.jsonl, line 4: span 1 has a text as "start"; the number of a character is wanted',
        "rows.jsonl, line 5: span 1 (name) holds no word: '  '",
        'rows.jsonl, line 5: span 2 has a null as "label"; a name is wanted',
        'rows.jsonl, line 6: "text" is empty',
        'rows.jsonl, line 7: "spans" is a text; a list is wanted',
        'rows.jsonl, line 8: "tokens": entry 2 is empty',
        "rows.jsonl, line 9: 1 tokens and 2 tags",
        'rows.jsonl, line 10: "tags": entry 1 is a number; a text is wanted',
    ]


def test_conll_files(tmp_path: Path) -> None:
    text = "# id = 1\n-DOCSTART- -X- O\n\nAnn NNP B-name\nleft VBD O\n\t\n# # B-name\nBob NNP I-name\n\nNobody O\n"
    for name in ("train.conll", "train.bio", "train.tsv"):
        (tmp_path / name).write_text(text.replace(" ", "\t") if name.endswith("tsv") else text, encoding="utf-8")
    for name in ("train.conll", "train.bio"):
        found = scan(str(tmp_path / name), task=None, columns=None, valid=None)
        assert found.problems.lines() == [f"{name}, line 10: 2 columns; the lines before have 3"]
        assert [row["tokens"] for _, _, row in found.rows("train")] == [["Ann", "left"], ["#", "Bob"]]
    (tmp_path / "dev.tsv").write_text("Ann\tB-name\nleft\tO\n\nEve\tB-nam\n", encoding="utf-8")
    (tmp_path / "some.tsv").write_text("Ann\tB-name\n\nBob\tB-name\n\nEve\tO\nand\tO\n", encoding="utf-8")
    found = scan(str(tmp_path / "some.tsv"), task=None, columns=None, valid=str(tmp_path / "dev.tsv"))
    assert found.labels == ["O", "B-name", "I-name"]
    assert found.problems.lines() == ['dev.tsv, line 4: the label "B-nam" does not occur in training. Did you mean "B-name"?']
    (tmp_path / "table.tsv").write_text("text\tlabel\nhello\tO\nyou\tB-x\n", encoding="utf-8")
    assert (
        scan(str(tmp_path / "table.tsv"), task=None, columns=None, valid=str(tmp_path / "table.tsv")).task.name
        == "text-classification"
    )
    assert guess_task(["tokens", "tags"]).name == guess_task(["text", "spans"]).name == TASK.name


def test_scores_are_seqevals_own() -> None:
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    truth = [["B-a", "I-a", "O", "B-b"], ["O", "B-b", "I-b"]]
    found = [["B-a", "O", "O", "B-b"], ["I-a", "B-b", "I-b"]]
    scores = span_scores(truth, found)
    theirs = {"micro_precision": precision_score, "micro_recall": recall_score, "f1": f1_score, "accuracy": accuracy_score}
    for name, score in theirs.items():
        assert scores[name] == pytest.approx(score(truth, found), **METRIC)
    assert scores["report"]["b"]["f1-score"] == 1.0
    assert set(scores["report"]) == {"a", "b"}
    assert span_scores([["O"]], [["O"]])["f1"] == 0.0


def save_tagger(folder: Path, family: str, labels: int) -> Path:
    """Save a random encoder or decoder that tags."""
    if family in tiny.ENCODERS:
        return tiny.save_encoder(folder, family, labels=labels, auto_class="AutoModelForTokenClassification")
    name, differs = tiny.DECODERS[family]
    special = {"bos_token_id": 262, "eos_token_id": 256, "pad_token_id": 260}
    config = getattr(transformers, name)(**{**tiny.LLAMA_SHAPE, **special, **differs, "num_labels": labels})
    return tiny._save(folder, "AutoModelForTokenClassification", config, 0)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert", "llama", "qwen2"])
def test_the_loss_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    folder = save_tagger(tmp_path / "model", family, len(LABELS))
    task, tokenizer = TASK, Tokenizer.from_folder(folder)
    model = load_model(open_model(str(folder)), task.name, base_bits=32).eval()
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    batch = to_tensors(task.collate([task.encode(row, tokenizer, LABELS) for row in named_rows(3)], tokenizer))
    loss, count = task.loss(model, batch)
    torch.testing.assert_close(loss / count, theirs(**batch).loss, **LOGITS_FP32)
    assert count == int((batch["labels"] >= 0).sum())


@pytest.mark.parametrize("family", ["deberta-v2", "modernbert", "llama", "qwen2"])
def test_the_graph_tags_as_torch_does(family: str, tmp_path: Path) -> None:
    folder = save_tagger(tmp_path / "model", family, 3)
    export(str(folder), tmp_path / "bundle", precision="fp32")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    classifier = Classifier(load(tmp_path / "bundle").bundle)
    examples = [TASK.truncate(example, 60) for example in TASK.trial_examples(classifier.processor)]
    for example, outputs in zip(examples, classifier.outputs(examples), strict=True):
        with torch.no_grad():
            wanted = theirs(input_ids=torch.from_numpy(example.arrays["ids"].astype(np.int64))[None]).logits[0].numpy()
        np.testing.assert_allclose(outputs["logits"][: len(example)], wanted, **ENCODER_FP32)


def test_the_whole_line(tmp_path: Path) -> None:
    model = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    data = write(tmp_path / "rows.jsonl", named_rows(72))
    config = FinetuneConfig(precision="int8", epochs=12.0, batch_size=8, rank=8, learning_rate=1e-2)
    figures = finetune(str(model), str(data), tmp_path / "run", config)
    assert figures["valid"]["f1"] > 0.9
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision="int8", force=True)
    assert exported["verify"]["passed"]
    assert [row["what"] for row in exported["table"]][:2] == ["majority baseline", "base"]
    bundle = evaluate(tmp_path / "bundle", str(data))["metrics"]
    assert bundle["f1"] > 0.9
    assert set(bundle["report"]) == {"name", "time"}
    config_json = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert config_json["architectures"] == ["BertForTokenClassification"]
    assert config_json["id2label"] == dict(zip("01234", LABELS, strict=True))
    shown: list[str] = []
    text = "call EVE DO at 5:10!"
    answer = run(tmp_path / "bundle", [text], write=shown.append)["output"]
    assert [(span["label"], span["text"]) for span in answer["spans"]] == [("name", "EVE DO"), ("time", "5:10")]
    assert "".join(shown).startswith("call ⟦EVE DO: name ")
    assert all(text[span["start"] : span["end"]] == span["text"] for span in answer["spans"])
    other = write(tmp_path / "other.jsonl", [{"text": "in Rome", "spans": [[3, 7, "place"]]}])
    with pytest.raises(DataError, match="has 1 problem") as caught:
        evaluate(tmp_path / "bundle", str(other))
    assert caught.value.problems == [
        'other.jsonl, line 1: the label "B-place" does not occur in training. Did you mean "B-name"?'
    ]
