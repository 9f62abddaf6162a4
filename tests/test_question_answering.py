"""Questions and contexts through the whole line: read, windowed, learned as transformers learns, scored, exported, run."""

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
from edgelora.run.batch import run_file
from edgelora.run.classify import Classifier
from edgelora.run.model import load
from edgelora.tasks import get_task
from edgelora.tasks.answers import Found, answer_scores, best_span, choose
from edgelora.tasks.contexts import cut
from edgelora.tokenizer import Tokenizer
from edgelora.train.finetune import finetune
from tests import tiny
from tests.test_token_classification import write
from tests.tolerances import ENCODER_FP32, LOGITS_FP32, METRIC

TASK = get_task("question-answering")


def rows(count: int) -> list[dict[str, Any]]:
    """The answer is what is in capitals; where nothing is, there is none."""
    made = []
    for number in range(count):
        name = ("ANN", "BOB", "EVE", "")[number % 4]
        context = f"{'xyz'[number % 3]} {name or 'no'} {'uvw'[number // 4 % 3]}"
        answers = [{"text": name, "answer_start": context.index(name)}] if name else []
        made.append({"question": "who", "context": context, "answers": answers})
    return made


def test_windows_are_those_of_transformers(tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    context = " ".join(f"word{number}" for number in range(30))
    row = {"question": "where?", "context": context, "answers": [{"text": "word17", "answer_start": context.index("word17")}]}
    example = TASK.encode(row, ours, [])
    windows = cut(example, 60, 20)
    wanted = theirs("where?", context, max_length=60, stride=20, truncation="only_second", return_overflowing_tokens=True)
    assert [window.arrays["ids"].tolist() for window in windows] == wanted["input_ids"]
    answers = [window.arrays["ids"][window.arrays["start"] : window.arrays["end"] + 1] for window in windows]
    with_one = [ours.decode(ids.tolist()) for ids, window in zip(answers, windows, strict=True) if window.arrays["start"]]
    assert set(with_one) == {"word17"}
    assert TASK.windows(example, 500) == [example]
    assert TASK.example_problems(example, 6) == ["the question has 6 tokens, which leaves none of 6 to the context"]


def test_scores_are_those_of_the_official_script() -> None:
    found = ["The Eiffel Tower!", "in Paris, France", "", "Rome"]
    scores = answer_scores(found, [["eiffel tower"], ["Paris", "Paris France"], [], []])
    assert scores["exact_match"] == pytest.approx((1 + 0 + 1 + 0) / 4, **METRIC)
    assert scores["f1"] == pytest.approx((1 + 0.8 + 1 + 0) / 4, **METRIC)
    assert scores["has_answer_f1"] == pytest.approx(0.9, **METRIC)
    assert scores["no_answer_accuracy"] == 0.5
    assert set(answer_scores(["a b"], [["b"]])) == {"exact_match", "f1"}


def test_the_best_span_is_in_the_context_and_in_order() -> None:
    places = np.array([[-1, -1], [-1, -1], [0, 3], [4, 7], [8, 9]])
    start, end = np.log([0.1, 0.5, 0.1, 0.2, 0.1]), np.log([0.1, 0.2, 0.5, 0.1, 0.1])
    best, nothing = best_span(start, end, places)
    assert best.place == (0, 3)
    assert best.probability == pytest.approx(0.05)
    assert nothing.probability == pytest.approx(0.01)
    other = (Found((1, 2), -9.0, 0.0), Found(None, -1.0, 0.4))
    assert choose([(best, nothing), other]).place == (0, 3)
    assert choose([other]).place is None


def test_what_is_wrong_with_rows(tmp_path: Path) -> None:
    good = {"question": "who?", "context": "It was Ann."}
    given: list[Any] = [
        {"text": ["Ann"], "answer_start": [7]}, ["Ann"], [{"text": "Ann", "answer_start": 6}], ["Bob"], [{"answer_start": 3}],
        "Ann", {"text": ["Ann"], "answer_start": []}, [{"text": "Ann", "answer_start": "7"}],
    ]  # fmt: skip
    data = write(tmp_path / "rows.jsonl", [*({**good, "answers": answers} for answers in given), {**good, "context": " "}])
    assert scan(str(data), task=None, columns=None, valid=None).problems.lines()[:7] == [
        'rows.jsonl, line 3: answer 1 "Ann" is not at 6 of the context, where it has " An"',
        'rows.jsonl, line 4: answer 1 "Bob" is not in the context',
        'rows.jsonl, line 5: answer 1 is a object without text; {"text", "answer_start"} is wanted',
        'rows.jsonl, line 6: "answers" is a text; a list of {"text", "answer_start"} is wanted',
        'rows.jsonl, line 7: "answers" has not as many entries in "answer_start" as in "text"',
        'rows.jsonl, line 8: answer 1 has a text as "answer_start"; the number of a character is wanted',
        'rows.jsonl, line 9: "context" is empty',
    ]


def test_squad_files(tmp_path: Path) -> None:
    questions = [
        {"id": "1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 7}], "is_impossible": False},
        {"id": "2", "question": "When?", "answers": [], "plausible_answers": [], "is_impossible": True},
    ]
    content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "It was Ann.", "qas": questions}]}]}
    for indent in (None, 2):
        (tmp_path / "train.json").write_text(json.dumps(content, indent=indent), encoding="utf-8")
        found = scan(str(tmp_path / "train.json"), task=None, columns=None, valid=None)
        assert found.task.name == TASK.name
        assert [(number, row["answers"]) for _, number, row in found.rows("train")] == [(1, questions[0]["answers"]), (2, [])]
    (tmp_path / "train.json").write_text('{"data": [{"para', encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        scan(str(tmp_path / "train.json"), task=None, columns=None, valid=None)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_loss_and_graph_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path / "model", family, labels=2, auto_class="AutoModelForQuestionAnswering")
    tokenizer = Tokenizer.from_folder(folder)
    model = load_model(open_model(str(folder)), TASK.name, base_bits=32).eval()
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    examples = [TASK.encode(row, tokenizer, []) for row in rows(3)]  # of one length: transformers scores padding too
    batch = to_tensors(TASK.collate(examples, tokenizer))
    loss, count = TASK.loss(model, batch)
    named = {
        name.replace("labels_start", "start_positions").replace("labels_end", "end_positions"): t for name, t in batch.items()
    }
    named = named if family != "modernbert" else {name: tensor for name, tensor in named.items() if name != "token_type_ids"}
    wanted = theirs(**named)
    torch.testing.assert_close(loss / count, wanted.loss, **LOGITS_FP32)
    if family == "bert":
        return  # its graph is in the test of the whole line
    export(str(folder), tmp_path / "bundle", precision="fp32")
    outputs = Classifier(load(tmp_path / "bundle").bundle).outputs(examples)
    for name in ("start_logits", "end_logits"):
        found = np.stack([said[name] for said in outputs])
        np.testing.assert_allclose(found, wanted[name].detach().numpy(), **ENCODER_FP32)


def test_the_whole_line(tmp_path: Path) -> None:
    model = tiny.save_encoder(tmp_path / "model", "bert", base_only=True)
    data = write(tmp_path / "rows.jsonl", rows(64))
    config = FinetuneConfig(precision="int8", epochs=6.0, batch_size=8, rank=8, learning_rate=1e-2)
    figures = finetune(str(model), str(data), tmp_path / "run", config)
    assert figures["valid"]["f1"] > 0.5
    assert export(str(tmp_path / "run"), tmp_path / "bundle", precision="int8", force=True)["verify"]["passed"]
    assert evaluate(tmp_path / "bundle", str(data))["metrics"]["f1"] > 0.5
    shown: list[str] = []
    answer = run(tmp_path / "bundle", ["who", "y BOB v"], write=shown.append)["output"]
    assert answer["answer"] == ("" if answer["start"] is None else "y BOB v"[answer["start"] : answer["end"]])
    assert "".join(shown).startswith(answer["answer"] or "(no answer)")
    long = "x no u " * 20 + "BOB" + " x no u" * 20  # over the model's 66 positions
    answer = run(tmp_path / "bundle", [json.dumps({"question": "who", "context": long})])["output"]
    assert answer["answer"] in long
    with pytest.raises(DataError, match="a question and its context are wanted"):
        run(tmp_path / "bundle", ["who"])
    asked = write(tmp_path / "asked.jsonl", [{"q": "who", "context": "z no w", "more": 1}])
    run_file(tmp_path / "bundle", asked, tmp_path / "answers.jsonl", columns={"question": "q"})
    answered = json.loads((tmp_path / "answers.jsonl").read_text())
    assert (answered["more"], set(answered["output"])) == (1, {"answer", "start", "end", "probability", "context"})
