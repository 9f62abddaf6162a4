"""The benchmark of merging: its evaluator against transformers and `edgelora evaluate`, its splits, steps and verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faked_bench import banking_file, e2e_file, make_bench, measured
from merge_bench import __main__ as command
from merge_bench import e2e, environments, score, splits, verdict
from merge_bench.bench import Bench, StepFailed
from tolerances import SCORED_LOSS
from training_bench.processes import Measured

__all__ = ["banking_file", "e2e_file"]  # fixtures

ROWS = [
    {"ids": [70, 71, 72, 73, 74, 75], "supervised": [0, 0, 0, 1, 1, 1]},
    {"ids": [90, 91, 92], "supervised": [0, 1, 0]},
    {"ids": list(range(40, 80)), "supervised": [0] * 20 + [1] * 20},
]


def test_the_loss_is_that_of_transformers(decoder_model: Path) -> None:
    """Token-weighted over rows of unequal length: the mean of transformers' means would be another number."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(decoder_model, dtype=torch.float32).eval()
    total, means = 0.0, []
    for row in ROWS:
        labels = [token if wanted else -100 for token, wanted in zip(row["ids"], row["supervised"], strict=True)]
        with torch.inference_mode():
            means.append(float(model(torch.tensor([row["ids"]]), labels=torch.tensor([labels])).loss))
        total += means[-1] * sum(row["supervised"])
    found = score.mean_loss(score.torch_logits(decoder_model, 1), ROWS)
    tokens = sum(sum(row["supervised"]) for row in ROWS)
    assert found["loss"] == pytest.approx(total / tokens, **SCORED_LOSS)
    assert (found["tokens"], found["rows"]) == (tokens, 3)
    assert found["loss"] != pytest.approx(sum(means) / len(means), rel=1e-3)


def test_a_bundle_scores_as_edgelora_evaluate_says(decoder_model: Path, decoder_bundle: Path, tmp_path: Path) -> None:
    from edgelora.evaluate import evaluate

    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"number {i}", "completion": "one " * (1 + 3 * i)} for i in range(4)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    ids = splits.write_ids(rows, decoder_model, tmp_path / "ids.jsonl")
    found = score.mean_loss(score.onnx_logits(decoder_bundle / "onnx" / "model.onnx", 1), score.read_rows(ids))
    told = evaluate(decoder_bundle, str(rows), generate=False, threads=1)["metrics"]["loss"]
    assert found["loss"] == pytest.approx(told, **SCORED_LOSS)
    assert found["loss"] == pytest.approx(
        score.mean_loss(score.torch_logits(decoder_model, 1), score.read_rows(ids))["loss"], **SCORED_LOSS
    )
    e2e.check_evaluator(found["loss"], told)
    assert len(score.read_rows(ids, 2)) == 2


def test_an_evaluator_that_differs_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"1\.50000, edgelora evaluate 1\.51000"):
        e2e.check_evaluator(1.5, 1.51)
    with pytest.raises(SystemExit, match="1 positions have logits, 3 tokens"):
        score.row_loss(np.zeros((1, 8), np.float32), [1, 2, 3], [0, 1, 1])
    with pytest.raises(SystemExit, match="no row has a target"):
        score.mean_loss(lambda ids: np.zeros((len(ids), 8), np.float32), [{"ids": [1, 2], "supervised": [1, 0]}])


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1000.0, 0.0], [0.0, 0.0]], np.float32)
    assert score.row_loss(logits, [0, 0], [0, 1]) == (0.0, 1)
    assert score.row_loss(logits, [0, 1], [0, 1])[0] == pytest.approx(1000.0)


def test_no_meaning_is_trained_and_scored(tmp_path: Path, e2e_file: Path) -> None:
    folder = splits.e2e(e2e_file, tmp_path)
    found = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "valid", "test")
    }
    prompts = {name: {row["prompt"] for row in rows} for name, rows in found.items()}
    assert sum(map(len, found.values())) == 300
    assert len(found["test"]) == 30
    assert not prompts["train"] & (prompts["test"] | prompts["valid"])
    assert not prompts["valid"] & prompts["test"]
    assert found["test"][0]["prompt"].startswith("Describe: name[Inn ")
    before = (folder / "test.jsonl").read_bytes()
    assert (splits.e2e(e2e_file, tmp_path) / "test.jsonl").read_bytes() == before
    few = splits.first_rows(folder / "test.jsonl", 3, tmp_path / "few.jsonl")
    assert few.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])


def test_each_label_gives_its_share(tmp_path: Path, banking_file: Path) -> None:
    folder = splits.banking(banking_file, tmp_path)
    rows = {name: (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "valid", "test")}
    labels = [json.loads(line)["label"] for line in rows["test"]]
    assert sum(map(len, rows.values())) == 210
    assert {labels.count(f"label {i}") for i in range(5)} <= {8, 9}  # a row that is there twice goes to one side whole
    assert not set(rows["train"]) & set(rows["test"])


def test_a_step_is_made_once(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def runner(words: list[str], **_: Any) -> Measured:
        calls.append(words)
        out.mkdir(parents=True)
        return measured(loss=1.5)

    bench = make_bench(tmp_path / "work", runner)
    out = bench.place("it")

    def again() -> Bench:
        return make_bench(tmp_path / "work", runner)  # another process: from the file

    assert bench.step("it", lambda: ["a"], out)["result"] == {"loss": 1.5}
    assert again().step("it", lambda: ["b"], out)["result"] == {"loss": 1.5}
    assert calls == [["a"]]
    out.rmdir()  # what later steps read is gone: the record alone is worth nothing
    again().step("it", lambda: ["c"], out)
    assert calls == [["a"], ["c"]]


def test_what_reads_a_new_folder_is_made_anew(tmp_path: Path) -> None:
    calls: list[str] = []

    def runner(words: list[str], **_: Any) -> Measured:
        calls.append(words[0])
        bench.place("run").mkdir(parents=True, exist_ok=True)
        return measured()

    bench = make_bench(tmp_path, runner)

    def both() -> list[str]:
        calls.clear()
        bench.step("run", lambda: ["train", str(bench.place("run"))], bench.place("run"))
        bench.step("loss", lambda: ["score", str(bench.place("run") / "model.onnx")])
        bench.step("other", lambda: ["else", str(tmp_path / "elsewhere")])
        return list(calls)

    assert both() == ["train", "score", "else"]
    assert both() == []
    bench.place("run").rmdir()
    assert both() == ["train", "score"]


def test_a_step_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    codes = [1, 0]

    def runner(words: list[str], **_: Any) -> Measured:
        code = codes.pop(0)
        return Measured(words, code, 1.0, 10.0, 10.0, None, 0.0, message="error: no room\nhint: more" if code else "")

    bench = make_bench(tmp_path, runner)
    with pytest.raises(StepFailed, match="it failed: error: no room"):
        bench.step("it", lambda: ["a"])
    assert bench.step("it", lambda: ["a"])["outcome"] == "done"


def test_settings_have_records_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "fast.toml").write_text("rank = 4\n", encoding="utf-8")
    plain = make_bench(tmp_path, lambda *_, **__: measured())
    other = make_bench(tmp_path, lambda *_, **__: measured(), config=tmp_path / "fast.toml")
    assert plain.setup == "5-steps"
    assert other.setup.startswith("5-steps-fast-")
    assert plain.place("run") != other.place("run")


def test_verdicts_at_their_bounds() -> None:
    assert verdict.within(1.515, 1.5)
    assert not verdict.within(1.5151, 1.5)
    assert verdict.kept("merge", 1.5899, 2.4, 1.5)["holds"] == "yes"
    assert verdict.kept("merge", 1.60, 2.4, 1.5)["holds"] == "no"
    assert verdict.kept("merge", None, 2.4, 1.5)["holds"] == "not measured"
    assert verdict.losses([], e2e.OURS, 1.5, e2e.OTHERS)[0]["holds"] == "not measured"


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def call(words: list[str]) -> None:
        calls.append(words)
        (tmp_path / "environments" / "gptq").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(environments, "call", call)
    python = environments.interpreter("gptq", tmp_path)
    assert [words[-1] for words in calls[1:]] == [environments.TORCH, environments.REQUIREMENTS["gptq"][-1]]
    assert all(words[0] == python for words in calls[1:])
    assert environments.interpreter("gptq", tmp_path) == python
    assert len(calls) == 3
    monkeypatch.setitem(environments.REQUIREMENTS, "gptq", (environments.TORCH,))
    environments.interpreter("gptq", tmp_path)
    assert len(calls) == 6
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="ended with 3:\ngone"):
        environments.call([sys.executable, "-c", "import sys; print('gone', file=sys.stderr); sys.exit(3)"])


def test_parts_ask_for_their_rows(e2e_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = command.parse(["--what", "e2e", "--e2e", str(e2e_file)])
    assert (given.what, given.steps, given.rows) == (("e2e",), 300, 256)
    for arguments in (["--what", "banking", "--e2e", str(e2e_file)], ["--what", "e2e,peft"], ["--what", "speed"]):
        with pytest.raises(SystemExit):
            command.parse(arguments)
    told = capsys.readouterr().err
    assert "--banking FILE.csv is needed by --what banking" in told
    assert "--e2e FILE.csv is needed by --what e2e,peft" in told
    assert "speed is no part; allowed: e2e, banking, peft" in told
