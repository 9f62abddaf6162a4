"""The Python API and what the verbs call: answers, files of rows, the chat, and their messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgelora
from edgelora.bundle import open_bundle
from edgelora.config import GenerateConfig
from edgelora.errors import DataError, FolderError, UserError
from edgelora.run.answer import run
from edgelora.run.batch import run_file
from edgelora.run.chat import chat
from edgelora.run.generate import Answer
from edgelora.run.model import Model

SHORT = GenerateConfig(max_new_tokens=6)


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """Return what stands for a person at the keyboard."""
    waiting: Iterator[str | type[BaseException]] = iter(lines)

    def read(prompt: str) -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_generate_stream_and_run_agree(decoder_bundle: Path) -> None:
    model = edgelora.load(decoder_bundle, threads=1)
    text = model.generate("hello", max_new_tokens=6)
    assert "".join(model.stream("hello", max_new_tokens=6)) == text
    assert model.generate([{"role": "user", "content": "hello"}], SHORT) == text
    shown: list[str] = []
    result = run(decoder_bundle, ["hello"], SHORT, threads=1, write=shown.append)
    assert result == {"task": "text-generation", "output": text}
    assert "".join(shown) in (text + "\n", text + " … (cut: --max-new-tokens)\n")
    assert run(decoder_bundle, ["hello", "you"], SHORT, threads=1)["output"] == [text, model.generate("you", SHORT)]


def test_classify_gives_every_label_sorted(classifier_bundle: Path) -> None:
    model = edgelora.load(classifier_bundle, threads=1)
    texts = ["a", "a much longer text than the others", "bb", "b" * 500]
    together = model.classify(texts, batch_size=3)
    for text, labelled in zip(texts, together, strict=True):
        assert sorted(label for label, _ in labelled) == sorted(model.labels)
        assert [p for _, p in labelled] == sorted((p for _, p in labelled), reverse=True)
        assert sum(p for _, p in labelled) == pytest.approx(1)
        alone = model.classify([text])[0]
        assert [label for label, _ in alone] == [label for label, _ in labelled], "padding changes nothing"
        assert [p for _, p in alone] == pytest.approx([p for _, p in labelled], abs=1e-4)
    assert model.classify([]) == []
    assert model.classify([("a", "b")])[0] != together[0]
    output = run(classifier_bundle, ["a"], threads=1)["output"]
    assert [entry["label"] for entry in output] == [label for label, _ in together[0]]


def test_a_bundle_is_asked_for_what_it_does(decoder_bundle: Path, classifier_bundle: Path) -> None:
    with pytest.raises(UserError) as caught:
        edgelora.load(classifier_bundle).generate("x")
    assert caught.value.message == f"{classifier_bundle} is a text-classification bundle: it writes no text"
    with pytest.raises(UserError) as caught:
        edgelora.load(decoder_bundle).classify(["x"])
    assert caught.value.message == f"{decoder_bundle} is a text-generation bundle: it writes text, it has no labels"


def test_no_bundle_and_no_input_are_messages(decoder_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError) as caught:
        edgelora.load(tmp_path)
    assert caught.value.message == f"{tmp_path} is not a bundle folder: it has no edgelora.json"
    with pytest.raises(UserError) as missing:
        run(decoder_bundle, [])
    assert (missing.value.message, missing.value.hint) == ("no input was given", f'edgelora run {decoder_bundle} "some text"')


def test_a_task_of_the_future_is_a_message(decoder_bundle: Path) -> None:
    bundle = replace(open_bundle(decoder_bundle), task="telepathy")
    with pytest.raises(UserError) as caught:
        Model(bundle)
    assert caught.value.message == f'{decoder_bundle} is for the task "telepathy", which this EdgeLoRA cannot run'
    assert caught.value.hint == "pip install --upgrade edgelora"


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_of_rows_gets_outputs(decoder_bundle: Path, tmp_path: Path) -> None:
    model = edgelora.load(decoder_bundle, threads=1)
    asked = [{"role": "user", "content": "you"}]
    rows = [
        {"prompt": "hello", "id": 7},
        {"messages": [*asked, {"role": "assistant", "content": "reference"}]},
        {"prompt": "é", "completion": "ref"},
    ]
    out = tmp_path / "new" / "out.jsonl"
    result = run_file(decoder_bundle, write_jsonl(tmp_path / "rows.jsonl", rows), out, SHORT, threads=1)
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    wanted = [model.generate(prompt, SHORT) for prompt in ("hello", asked, "é")]
    assert written == [{**row, "output": output} for row, output in zip(rows, wanted, strict=True)]
    assert (result["rows"], result["output"]) == (3, str(out))
    with pytest.raises(FolderError, match="exists already"):
        run_file(decoder_bundle, tmp_path / "rows.jsonl", out, SHORT)
    run_file(decoder_bundle, tmp_path / "rows.jsonl", out, GenerateConfig(max_new_tokens=1), overwrite=True)
    assert [entry.name for entry in out.parent.iterdir()] == ["out.jsonl"]


def test_a_csv_of_texts_is_classified(classifier_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("query,n\nhello,1\nwhere is it?,2\n", encoding="utf-8")
    out = tmp_path / "out.jsonl"
    run_file(classifier_bundle, tmp_path / "rows.csv", out, columns={"text": "query"})
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    model = edgelora.load(classifier_bundle)
    best = [entry["output"][0]["label"] for entry in written]
    assert best == [labelled[0][0] for labelled in model.classify(["hello", "where is it?"])]
    assert [entry["n"] for entry in written] == ["1", "2"]


def test_bad_rows_are_listed_by_line_and_nothing_is_written(decoder_bundle: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = ['{"prompt": "good"}', "{broken", '{"promt": "x"}', '{"prompt": 3}', '{"messages": []}', '{"prompt": " "}']
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        run_file(decoder_bundle, rows, tmp_path / "out.jsonl")
    assert caught.value.message.splitlines() == [
        f"{rows} has rows that cannot be run:",
        "  line 2: not JSON: Expecting property name enclosed in double quotes at column 2",
        "  line 3: no messages or prompt or text among the keys promt",
        '  line 4: "prompt" is a number; text is wanted',
        '  line 5: "messages" must be a list of {"role": …, "content": …}',
        '  line 6: "prompt" is empty',
    ]
    assert not (tmp_path / "out.jsonl").exists()


def test_the_chat_keeps_its_history_and_its_cache(decoder_bundle: Path) -> None:
    shown: list[str] = []
    result = chat(decoder_bundle, SHORT, threads=1, read=typed("hello", "", "/what", "again", "/exit"), write=shown.append)
    model = edgelora.load(decoder_bundle, threads=1)
    first = model.generate("hello", SHORT)
    asked = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "again"},
    ]
    second = {"role": "assistant", "content": model.generate(asked, SHORT)}
    assert result == {"turns": 2, "messages": [*asked, second]}
    text = "".join(shown)
    assert first in text
    assert "/what is not a command. /reset forgets" in text


def test_reset_forgets_and_the_end_of_input_ends(decoder_bundle: Path) -> None:
    shown: list[str] = []
    result = chat(decoder_bundle, SHORT, threads=1, read=typed("hello", "/reset", "you"), write=shown.append)
    assert [message["content"] for message in result["messages"]][:1] == ["you"]
    assert "The conversation is forgotten." in "".join(shown)


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(decoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Answer) -> Iterator[str]:
        self.text = "half"
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(Answer, "__iter__", interrupted)
    result = chat(decoder_bundle, SHORT, threads=1, read=typed("hello"), write=lambda text: None)
    assert result["messages"] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "half"}]


def test_a_conversation_over_the_limit_goes_on_after_a_message(decoder_bundle: Path) -> None:
    shown: list[str] = []
    result = chat(decoder_bundle, SHORT, threads=1, read=typed("a" * 2000, "hello"), write=shown.append)
    assert result["turns"] == 1
    assert "error: the text has 2003 tokens; this bundle takes at most 1024\n/reset begins anew.\n" in "".join(shown)
