"""Rows to stores: what arrives, and what is refused, all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelora import hardware
from edgelora.config import FinetuneConfig
from edgelora.data.describe import describe, plain
from edgelora.data.prepare import Prepared, prepare
from edgelora.errors import DataError, FolderError, MachineError, ModelError, SettingsError
from edgelora.tasks import get_task
from edgelora.tokenizer import Tokenizer
from tests import tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def write_rows(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def commands(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"on {number}", "completion": f"ok {number}"} for number in range(count)]


def refused(data: str, model: Path, *, max_length: int = 64, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        prepare(data, model, model.parent / "refused", FinetuneConfig(**settings), max_length=max_length)
    assert not (model.parent / "refused").exists()
    return caught.value


def test_rows_become_stores_and_texts(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", commands(30))
    prepared = prepare(data, model, tmp_path / "out", FinetuneConfig(), max_length=64)
    assert prepared == Prepared.open(tmp_path / "out")
    assert (prepared.task, prepared.labels, prepared.rows) == ("text-generation", [], {"train": 27, "valid": 3})
    task, tokenizer = get_task(prepared.task), Tokenizer.from_folder(model)
    texts, store = prepared.texts("valid"), prepared.store("valid")
    assert [tokenizer.decode(e.arrays["ids"].tolist(), skip_special_tokens=False) for e in store] == [
        f"<|user|>{row['prompt']}<|end|><|assistant|>{row['completion']}<|end|>" for row in texts
    ]
    assert prepared.tokens["valid"] == store.lengths.sum()
    assert prepared.supervised["valid"] == sum(int(e.arrays["supervised"].sum()) for e in store)
    trained = {tuple(e.arrays["ids"].tolist()) for e in prepared.store("train")}
    assert not trained & {tuple(task.encode(row, tokenizer, []).arrays["ids"].tolist()) for row in texts}


def test_folders_and_files_of_validation_rows_are_taken_as_they_are(model: Path, tmp_path: Path) -> None:
    rows = commands(9)
    write_rows(tmp_path / "rows" / "train.jsonl", rows[:5])
    write_rows(tmp_path / "rows" / "test.jsonl", rows[5:6])
    valid = write_rows(tmp_path / "held.jsonl", rows[6:])
    prepared = prepare(str(tmp_path / "rows"), model, tmp_path / "out", FinetuneConfig(valid=valid), max_length=64)
    assert prepared.rows == {"train": 5, "test": 1, "valid": 3}
    assert (prepared.texts("test"), prepared.texts("valid")) == (rows[5:6], rows[6:])


def test_labels_are_mapped_counted_and_ordered(model: Path, tmp_path: Path) -> None:
    rows = [{"utterance": f"{number}", "intent": "ab"[number % 2]} for number in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = FinetuneConfig(columns={"text": "utterance", "label": "intent"})
    prepared = prepare(data, model, tmp_path / "out", config, max_length=64)
    assert (prepared.task, prepared.labels) == ("text-classification", ["a", "b"])
    assert prepared.label_counts == {"train": {"a": 18, "b": 18}, "valid": {"a": 2, "b": 2}}
    wanted = [prepared.labels.index(row["label"]) for row in prepared.texts("valid")]
    assert [int(e.arrays["label"]) for e in prepared.store("valid")] == wanted


def test_every_problem_is_listed_at_once_with_its_line(model: Path, tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    rows = [good, '{"prompt": "a", "prompt": "b"}', {"prompt": "", "completion": "b"}, {"prompt": "a"}, "[", "",
            {"prompt": "a" * 80, "completion": "b"}, '{"prompt": "\\ud83d", "completion": "b"}', good]  # fmt: skip
    error = refused(write_rows(tmp_path / "rows.jsonl", rows), model)
    assert error.problems == [
        'rows.jsonl, line 2: not JSON: the key "prompt" occurs twice',
        'rows.jsonl, line 3: "prompt" is empty',
        'rows.jsonl, line 4: "completion" is missing',
        "rows.jsonl, line 5: not JSON: Expecting value at column 2",
        "rows.jsonl, line 6: an empty line",
        "rows.jsonl, line 7: 85 tokens, over the limit of 64",
        'rows.jsonl, line 8: "prompt" holds half a character (\\ud83d): wrong encoding',
    ]
    assert error.message == "\n  ".join([f"{tmp_path / 'rows.jsonl'} has 7 problems:", *error.problems])
    assert error.hint == "--truncate cuts long rows, --max-length N allows longer ones"


def test_rows_are_cut_only_when_asked_and_not_to_nothing(model: Path, tmp_path: Path) -> None:
    rows = [*commands(8), {"prompt": "a", "completion": "b" * 80}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert refused(data, model).problems == ["rows.jsonl, line 9: 85 tokens, over the limit of 64"]
    prepared = prepare(data, model, tmp_path / "out", FinetuneConfig(truncate=True), max_length=64)
    assert prepared.truncated == 1
    assert max(prepared.store(split).lengths.max() for split in prepared.rows) == 64
    data = write_rows(tmp_path / "rows.jsonl", [*commands(8), {"prompt": "a" * 80, "completion": "b"}])
    wanted = ["rows.jsonl, line 9: no supervised token: nothing to learn from"]
    assert refused(data, model, truncate=True).problems == wanted


def test_labels_that_training_has_not_seen_are_refused(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows" / "train.jsonl", [{"text": "a", "label": "cat"}, {"text": "b", "label": "dog"}])
    write_rows(tmp_path / "rows" / "valid.jsonl", [{"text": "c", "label": "cat"}, {"text": "d", "label": "dgo"}])
    error = refused(str(tmp_path / "rows"), model)
    assert error.problems == ['valid.jsonl, line 2: the label "dgo" does not occur in training. Did you mean "dog"?']


def test_labels_of_mixed_types_and_a_single_label_are_refused(model: Path, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "1"}, {"text": "c", "label": 2}, {"text": "d", "label": "x"}]
    error = refused(write_rows(tmp_path / "rows.jsonl", rows), model, valid="0.3")
    assert "rows.jsonl, line 1: labels are of mixed types: numbers here" in error.problems
    assert "rows.jsonl, line 2: labels are of mixed types: text here" in error.problems
    data = write_rows(tmp_path / "rows.jsonl", [{"text": str(number), "label": "x"} for number in range(5)])
    assert refused(data, model).message == f'every row of {data} has the label "x"; at least two are needed'


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"mr": "a", "ref": "b"}], {"columns": {"prompt": "mrr", "completion": "ref"}},
         'rows.jsonl has no column "mrr" (for prompt). Did you mean "mr"? Columns: mr, ref'),
        ([{"prompt": "a", "label": "b"}], {"task": "text-classification"},
         "text-classification wants the columns text and text_pair and label, or text and label; DATA has prompt, label"),
        ([], {}, "rows.jsonl has no rows"),
        ([{"text": "a"}] * 3, {}, "DATA has no rows to spare for validation: all are the same"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_as_a_whole(
    rows: list[Any], settings: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert refused(data, model, **settings).message == message.replace("DATA", data)


def test_errors_of_the_child_are_those_of_the_parent(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", commands(3))
    for settings, kind, text in (
        (
            {"columns": {"promt": "prompt"}},
            SettingsError,
            '--columns: "promt" is not one of our columns. Did you mean "prompt"?',
        ),
        ({"task": "text-generator"}, SettingsError, '"text-generator" is not a task. Did you mean "text-generation"?'),
        ({"valid": "2"}, SettingsError, "--valid is 2; allowed: a file, or a share between 0 and 1"),
    ):
        with pytest.raises(kind) as caught:
            prepare(data, model, tmp_path / "out", FinetuneConfig(**settings), max_length=64)
        assert caught.value.message.startswith(text)
        assert caught.value.hint is not None
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        prepare(data, tmp_path, tmp_path / "out", FinetuneConfig(), max_length=64)
    with pytest.raises(FolderError, match=r"has no prepared\.json"):
        Prepared.open(tmp_path)


def test_what_a_child_did_not_expect_is_a_message_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from edgelora.data.prepare import unexpected
    from edgelora.errors import EdgeLoRAError

    monkeypatch.delenv("EDGELORA_TRACEBACK", raising=False)
    (model / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    data = write_rows(tmp_path / "rows.jsonl", commands(3))
    with pytest.raises(EdgeLoRAError):
        prepare(data, model, tmp_path / "out", FinetuneConfig(), max_length=64)
    assert "Traceback" not in capfd.readouterr().err
    assert unexpected(PermissionError(13, "Permission denied", "a.jsonl"))["message"] == "a.jsonl: Permission denied"
    assert unexpected(KeyError("x"))["message"].startswith("preparing rows failed: KeyError: 'x' (unexpected")


def test_a_child_that_dies_is_said_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    killed = subprocess.CompletedProcess[bytes]([], -9, stdout=b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(MachineError, match=r"^preparing rows\.jsonl failed: it was killed: not enough memory$"):
        prepare("rows.jsonl", model, tmp_path / "out", FinetuneConfig(), max_length=64)


def test_describe_shows_what_is_trained(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", commands(30))
    result = plain(describe(data, model, FinetuneConfig()))
    assert result["splits"]["train"]["rows"] == 27
    assert result["first_rows"][0] in [f"<|user|>on {n}<|end|><|assistant|>⟦ok {n}<|end|>⟧" for n in range(3)]
    assert sum(entry["rows"] for entry in result["lengths"]["histogram"]) == 30
    without = describe(data, None, FinetuneConfig())
    assert without["splits"] == {"train": {"rows": 27}, "valid": {"rows": 3}}
    assert (without["lengths"]["unit"], without["lengths"]["min"], without["lengths"]["max"]) == ("characters", 8, 10)


def test_e2e_and_banking77(shared_data: Path, smollm2_folder: Path, minilm_folder: Path, tmp_path: Path) -> None:
    before = hardware.rss_mb()
    config = FinetuneConfig(columns={"prompt": "mr", "completion": "ref"})
    e2e = prepare(str(shared_data / "e2e_nlg.csv"), smollm2_folder, tmp_path / "e2e", config, max_length=256)
    assert e2e.rows == {"train": 4205, "valid": 467}
    config = FinetuneConfig(columns={"label": "category"}, valid="0.1")
    banking = prepare(str(shared_data / "banking77.csv"), minilm_folder, tmp_path / "banking", config, max_length=256)
    assert sum(banking.rows.values()) == 10003
    assert 990 <= banking.rows["valid"] <= 1000
    assert len(banking.labels) == len(banking.label_counts["valid"]) == 77
    assert hardware.rss_mb() - before < 8  # tokenizing 14,675 rows left nothing here


def test_validation_rows_that_are_there_twice_or_trained_too(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = commands(6)
    write_rows(tmp_path / "rows" / "train.jsonl", rows[:5])
    write_rows(tmp_path / "rows" / "valid.jsonl", rows[3:])
    prepare(str(tmp_path / "rows"), model, tmp_path / "out", FinetuneConfig(), max_length=64)
    assert "warning: 2 of the 3 valid rows are in training too: their scores will flatter\n" in capfd.readouterr().err
    with pytest.raises(SettingsError) as caught:
        prepare(str(tmp_path / "rows"), model, tmp_path / "other", FinetuneConfig(valid="0.2"), max_length=64)
    assert caught.value.message == f"--valid 0.2: {tmp_path / 'rows'} has validation rows of its own"
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert refused(str(tmp_path / "rows"), model, valid=empty).message == f"{tmp_path / 'rows'} leaves no row to validate with"
