"""The tasks: guessing, encoding, batches, metrics."""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelora.errors import DataError, MachineError, SettingsError
from edgelora.tasks import TASKS, get_task, guess_task
from edgelora.tasks.base import Example
from edgelora.tasks.generated import score_texts
from edgelora.tasks.text_classification import TextClassification
from edgelora.tasks.text_generation import TextGeneration
from edgelora.tokenizer import Tokenizer
from tests import tiny
from tests.tolerances import METRIC

GENERATION, CLASSIFICATION = TextGeneration(), TextClassification()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    tiny.save_tokenizer(tmp_path)
    return Tokenizer.from_folder(tmp_path)


@pytest.fixture
def raw_tokenizer(tmp_path: Path) -> Tokenizer:
    tiny.save_tokenizer(tmp_path / "raw", chat=False)
    return Tokenizer.from_folder(tmp_path / "raw")


class FixedPredictor:
    """Answers with what it was given."""

    def __init__(self, answers: Sequence[str] = (), tokenizer: Tokenizer | None = None, logits: Any = None) -> None:
        self.answers, self.tokenizer, self.fixed_logits = answers, tokenizer, logits
        self.prompts: list[list[int]] = []

    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        return [(2.0 * (number + 1), int(e.arrays["supervised"].sum())) for number, e in enumerate(examples)]

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]) -> list[list[int]]:
        assert self.tokenizer is not None
        assert stop == self.tokenizer.stop_token_ids
        self.prompts = [list(prompt) for prompt in prompts]
        return [self.tokenizer.encode(answer, add_special_tokens=False)[:max_new_tokens] for answer in self.answers]

    def logits(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        return np.array(self.fixed_logits, dtype=np.float32)


def test_tasks_are_found_guessed_and_their_modules_named_after_them() -> None:
    for name in TASKS:
        assert get_task(name).name == name
    for columns in ("messages",), ("messages", "tools", "id"), ("prompt", "completion"), ("text",):
        assert guess_task(columns).name == "text-generation"
    for columns in ("text", "label"), ("label", "text", "text_pair"):
        assert guess_task(columns).name == "text-classification"
    with pytest.raises(
        SettingsError, match=r'"text-clasification" is not a task\. Did you mean "text-classification"\? Tasks: '
    ):
        get_task("text-clasification")
    with pytest.raises(DataError) as caught:
        guess_task(["mr", "ref"])
    message = caught.value.message
    assert message.startswith(
        "no task has the columns mr, ref; wanted one of: messages (text-generation), prompt + completion "
    )
    for words in "text + text_pair + label (text-classification)", "image + label (image-classification)":
        assert words in message
    assert caught.value.hint == "--columns prompt=mr,completion=ref maps our names to the data's"


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "a", "completion": " "}, ['"completion" is empty']),
        ({"prompt": 1}, ['"prompt" is a number; text is wanted', '"completion" is missing']),
        ({}, ['"text" is missing']),
        ({"messages": []}, ['"messages" is empty; a list of {"role", "content"} is wanted']),
        ({"messages": "hi"}, ['"messages" is a text; a list of {"role", "content"} is wanted']),
        ({"messages": [{"role": "user", "content": "a"}]}, ["no supervised token: the chat has no assistant turn"]),
        ({"messages": [{"role": "usr", "content": "a"}, {"content": "b"}, {"role": "user", "content": 3}]},
         ['message 1 has the role "usr"; allowed: system, user, assistant, tool', 'message 2 has no "role"',
          'message 3: "content" is a number; text is wanted']),
        ({"messages": [{"role": "assistant", "content": ""}]}, ['message 1: "content" is empty']),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": "x"},
         ['"tools" is a text; a list of JSON schemas is wanted']),
    ],
)  # fmt: skip
def test_generation_rows_are_checked(row: dict[str, Any], wanted: list[str]) -> None:
    assert GENERATION.problems(GENERATION.normalize(row)) == wanted


def test_json_in_cells_is_parsed_and_other_columns_are_dropped() -> None:
    chat = '[{"role": "assistant", "content": "a"}]'
    row = GENERATION.normalize({"messages": chat, "tools": "[]", "id": 7, "text": None})
    assert row == {"messages": [{"role": "assistant", "content": "a"}], "tools": []}


def shown(task: Any, row: dict[str, Any], tokenizer: Tokenizer) -> str:
    from rich.text import Text

    return Text.from_markup(task.show(task.encode(row, tokenizer, ["no", "yes"]), tokenizer, ["no", "yes"])).plain


def test_pairs_become_turns_where_there_is_a_template_and_are_joined_where_there_is_none(
    tokenizer: Tokenizer, raw_tokenizer: Tokenizer
) -> None:
    row = {"prompt": "[b]a[/b]", "completion": "b"}
    assert shown(GENERATION, row, tokenizer) == "<|user|>[b]a[/b]<|end|><|assistant|>⟦b<|end|>⟧"
    assert shown(GENERATION, row, raw_tokenizer) == "[b]a[/b]⟦b<|end|>⟧"
    assert shown(GENERATION, {"text": "abc"}, raw_tokenizer) == "a⟦bc<|end|>⟧"
    assert GENERATION.prompt_ids(row, tokenizer) == tokenizer.encode(
        "<|user|>[b]a[/b]<|end|><|assistant|>", add_special_tokens=False
    )
    assert GENERATION.prompt_ids({"prompt": "ab"}, raw_tokenizer) == raw_tokenizer.encode("ab", add_special_tokens=False)


def test_what_follows_the_last_answer_is_cut(tokenizer: Tokenizer) -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert shown(GENERATION, row, tokenizer) == (
        "<|system|>s<|end|><|user|>a<|end|><|assistant|>⟦b<|end|>⟧<|user|>c<|end|><|assistant|>⟦d<|end|>⟧"
    )


def test_documents_are_packed_without_padding(raw_tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "ab", "completion": "c"}, {"text": "xyz"}]
    batch = GENERATION.collate([GENERATION.encode(row, raw_tokenizer, []) for row in rows], 0)
    assert batch["starts"].tolist() == [0, 3, 6]
    assert raw_tokenizer.decode(batch["ids"].tolist(), skip_special_tokens=False) == "abcxyz"  # nothing follows the last tokens
    assert batch["positions"].tolist() == [1, 2, 3, 4, 5]
    assert raw_tokenizer.decode(batch["targets"].tolist(), skip_special_tokens=False) == "c<|end|>yz<|end|>"
    assert {array.dtype.name for array in batch.values()} == {"int64"}


def test_the_loss_takes_the_state_before_each_supervised_token(raw_tokenizer: Tokenizer) -> None:
    import torch

    class Model:
        def hidden(self, ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
            return torch.arange(len(ids), dtype=torch.float32)[:, None]

        def nll(self, hidden_SH: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
            self.seen = hidden_SH.squeeze(1).tolist(), targets_S.tolist()
            return hidden_SH.sum()

    model = Model()
    batch = GENERATION.collate([GENERATION.encode({"prompt": "ab", "completion": "c"}, raw_tokenizer, [])] * 2, 0)
    loss, count = GENERATION.loss(model, {name: torch.from_numpy(array) for name, array in batch.items()})
    assert raw_tokenizer.decode(model.seen[1], skip_special_tokens=False) == "c<|end|>" * 2
    assert model.seen[0] == [1.0, 2.0, 4.0, 5.0]
    assert (float(loss), count) == (12.0, 4)


def test_generation_metrics_prompt_with_what_runs(tokenizer: Tokenizer) -> None:
    pairs = [("a", '{"x": 1}'), ("b", "plain"), ("c", "[2]")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    examples = [GENERATION.encode(row, tokenizer, []) for row in rows]
    predictor = FixedPredictor(['{"x":1}', "it is plain", " [2]\n"], tokenizer)
    metrics = GENERATION.evaluate(predictor, rows, examples, tokenizer, [], generate=True)
    assert predictor.prompts == [GENERATION.prompt_ids(row, tokenizer) for row in rows]
    loss = 12.0 / sum(len(completion) + 1 for _, completion in pairs)
    assert metrics == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "exact_match": 1 / 3, "contains": 2 / 3, "json_equal": 1.0}, **METRIC
    )
    assert set(GENERATION.evaluate(predictor, rows, examples, tokenizer, [], generate=False)) == {"loss", "perplexity"}


def test_json_equal_is_absent_without_json() -> None:
    assert score_texts(["a"], ["a"]) == {"exact_match": 1.0, "contains": 1.0}
    assert score_texts(["{"], ['{"a": [1, 2.0]}'])["json_equal"] == 0.0
    assert score_texts(['{"a": [1]}', "[1, 2]"], ['{"a": [true]}', "[1]"])["json_equal"] == 0.0
    assert score_texts(['{"b": 1, "a": 2}'], ['{"a": 2.0, "b": 1}'])["json_equal"] == 1.0


def test_labels_have_one_order() -> None:
    def labels(*values: Any) -> list[str]:
        return CLASSIFICATION.labels([name for value in values for name in CLASSIFICATION.label_names({"label": value})])

    assert labels("b", "a", "B", "b") == ["B", "a", "b"]
    assert labels(10, 9, 0, -1) == ["-1", "0", "9", "10"]
    assert labels("10", "9") == ["9", "10"]
    assert labels("10", "9", "x") == ["10", "9", "x"]
    assert labels(True, False) == ["false", "true"]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "a", "label": 0}, []),
        ({"text": "", "label": " "}, ['"text" is empty', '"label" is empty']),
        ({"text": "a"}, ['"label" is missing']),
        (
            {"text": "a", "label": 0.5},
            [
                '"label" is a number; a name or a whole number is wanted: numbers are --task text-regression '
                "--columns score=label"
            ],
        ),
        ({"text": "a", "text_pair": 1, "label": "x"}, ['"text_pair" is a number; text is wanted']),
    ],
)
def test_classification_rows_are_checked(row: dict[str, Any], wanted: list[str]) -> None:
    assert CLASSIFICATION.problems(CLASSIFICATION.normalize(row)) == wanted


def test_texts_and_pairs_on_minilm(minilm_folder: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_folder(minilm_folder), AutoTokenizer.from_pretrained(minilm_folder)
    texts = ["My card!", "Wo ist meine Karte, bitte? " * 80]
    examples = [CLASSIFICATION.encode({"text": text, "label": "yes"}, ours, ["no", "yes"]) for text in texts]
    cut = [CLASSIFICATION.truncate(example, 64) for example in examples]
    batch = CLASSIFICATION.collate(cut, ours)
    wanted = theirs(texts, padding=True, truncation=True, max_length=64, return_tensors="np")
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(batch[name], wanted[name])
    assert batch["labels"].tolist() == [1, 1]
    pair = CLASSIFICATION.encode({"text": "a b", "text_pair": "c", "label": "no"}, ours, ["no", "yes"])
    batch, wanted = CLASSIFICATION.collate([pair], ours), theirs("a b", "c", return_tensors="np")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        np.testing.assert_array_equal(batch[name], wanted[name])
    assert shown(CLASSIFICATION, {"text": "Hi [b]", "label": "yes"}, ours) == "[CLS] hi [ b ] [SEP] → ⟦yes⟧"
    assert int(CLASSIFICATION.encode({"text": "unlabelled"}, ours, ["no"]).arrays["label"]) == -1


def labelled(*indices: int) -> list[Example]:
    return [Example({"ids": np.array([1], np.int32), "label": np.array(index, np.int32)}) for index in indices]


def test_classification_metrics_are_those_of_scikit_learn(tokenizer: Tokenizer) -> None:
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.2, 0.6, 0.2]])
    examples = labelled(0, 1, 1, 1)
    metrics = CLASSIFICATION.evaluate(
        FixedPredictor(logits=logits + 5), [], examples, tokenizer, ["a", "b", "never"], generate=False
    )
    assert metrics["accuracy"] == pytest.approx(0.75, **METRIC)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2, **METRIC)
    assert metrics["loss"] == pytest.approx(-sum(map(math.log, (0.7, 0.8, 0.3, 0.6))) / 4, **METRIC)
    assert metrics["report"]["b"] == pytest.approx(
        {"precision": 1.0, "recall": 2 / 3, "f1-score": 0.8, "support": 3.0}, **METRIC
    )
    assert metrics["report"]["never"]["support"] == 0.0
    assert CLASSIFICATION.baseline(examples, ["a", "b", "never"])["accuracy"] == 0.75
    answer = CLASSIFICATION.decode({"logits": logits[0]}, {}, examples[0], tokenizer, ["a", "b", "c"])
    assert [entry["label"] for entry in answer] == ["a", "b", "c"]
    assert answer[0]["probability"] == pytest.approx(0.7, **METRIC)


def test_without_scikit_learn_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MachineError) as caught:
        CLASSIFICATION.baseline(labelled(0, 1), ["a", "b"])
    assert (caught.value.message, caught.value.hint) == ("these metrics need scikit-learn", 'pip install "edgelora[train]"')
