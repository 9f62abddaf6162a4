"""One evaluation code for torch and ONNX: the same figures, rows of every origin, and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tolerances

from edgelora.errors import DataError, FolderError, SettingsError
from edgelora.evaluate import evaluate
from edgelora.folder import write_manifest

PAIRS = [{"ask": f"say {word}", "answer": word} for word in ("one", "two", "three", "four", "five", "six")]
TEXTS = [{"text": text, "label": f"LABEL_{i % 3}"} for i, text in enumerate(["good", "bad", "so so", "fine", "awful", "meh"])]
COLUMNS = {"prompt": "ask", "completion": "answer"}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_decoder_scores_alike_in_torch_and_onnx(decoder_model: Path, decoder_bundle: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    torch_result = evaluate(decoder_model, data, columns=COLUMNS, threads=1)
    onnx_result = evaluate(decoder_bundle, data, columns=COLUMNS, threads=1)
    assert (torch_result["kind"], onnx_result["kind"]) == ("model", "bundle")
    assert torch_result["rows"] == onnx_result["rows"] == 6
    assert set(torch_result["metrics"]) == {"loss", "perplexity", "exact_match", "contains"}
    assert onnx_result["metrics"] == pytest.approx(torch_result["metrics"], rel=tolerances.ONNX_FP32_LOSS)


def test_the_loss_is_that_of_transformers(decoder_model: Path, decoder_bundle: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "hello", "completion": "you"}])
    result = evaluate(decoder_bundle, data, generate=False, threads=1)
    model = AutoModelForCausalLM.from_pretrained(decoder_model, dtype=torch.float32).eval()
    text = b"hello", b"you"
    byte = {number: index for index, number in enumerate(alphabet_order())}
    prompt, answer = ([byte[b] for b in part] for part in text)
    ids = torch.tensor([[257, *prompt, 256, 258, *answer, 256]])
    labels = ids.clone()
    labels[:, : len(prompt) + 3] = -100
    with torch.no_grad():
        wanted = float(model(ids, labels=labels).loss)
    assert result["metrics"]["loss"] == pytest.approx(wanted, rel=tolerances.ONNX_FP32_LOSS)
    assert set(result["metrics"]) == {"loss", "perplexity"}


def alphabet_order() -> list[int]:
    """Return the bytes in the order of the tiny tokenizer's ids: sorted by the letter that stands for each."""
    letters = {}
    spare = 0
    for number in range(256):
        visible = 33 <= number <= 126 or 161 <= number <= 172 or 174 <= number <= 255
        letters[number] = number if visible else 256 + spare
        spare += not visible
    return sorted(letters, key=lambda number: letters[number])


def test_a_classifier_scores_alike_in_torch_and_onnx(classifier_model: Path, classifier_bundle: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    torch_result = evaluate(classifier_model, data, threads=1)
    onnx_result = evaluate(classifier_bundle, data, threads=1)
    for result in (torch_result, onnx_result):
        assert set(result["metrics"]["report"]) == {"LABEL_0", "LABEL_1", "LABEL_2"}
        assert set(result["metrics"]["report"]["LABEL_0"]) == {"precision", "recall", "f1-score", "support"}
    assert onnx_result["metrics"]["accuracy"] == torch_result["metrics"]["accuracy"]
    assert onnx_result["metrics"]["loss"] == pytest.approx(torch_result["metrics"]["loss"], rel=1e-3)


def test_a_folder_gives_its_test_rows_and_rows_limits_them(decoder_bundle: Path, tmp_path: Path) -> None:
    for split, rows in (("train", PAIRS), ("valid", PAIRS[:4]), ("test", PAIRS[:3])):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    result = evaluate(decoder_bundle, str(tmp_path), columns=COLUMNS, generate=False, threads=1)
    assert (result["split"], result["rows"]) == ("test", 3)
    assert evaluate(decoder_bundle, str(tmp_path), columns=COLUMNS, rows=2, generate=False, threads=1)["rows"] == 2


def test_an_unknown_label_and_a_long_row_are_listed(classifier_bundle: Path, tmp_path: Path) -> None:
    rows = [*TEXTS, {"text": "x", "label": "LABEL_9"}, {"text": "y" * 500, "label": "LABEL_1"}, {"text": "z"}]
    with pytest.raises(DataError) as caught:
        evaluate(classifier_bundle, write_jsonl(tmp_path / "rows.jsonl", rows))
    lines = caught.value.message.splitlines()[1:]
    assert lines[0] == '  rows.jsonl, line 7: the label "LABEL_9" does not occur in training. Did you mean "LABEL_2"?'
    assert lines[1].startswith("  rows.jsonl, line 8: 50")
    assert lines[2] == '  rows.jsonl, line 9: "label" is missing'


def test_what_cannot_be_is_refused(decoder_bundle: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    with pytest.raises(SettingsError, match=f"no rows to score {decoder_bundle} on"):
        evaluate(decoder_bundle)
    with pytest.raises(SettingsError, match=f"--float is for runs; {decoder_bundle} is a bundle"):
        evaluate(decoder_bundle, data, float_=True)
    with pytest.raises(SettingsError, match="0 rows cannot be scored"):
        evaluate(decoder_bundle, data, rows=0)
    with pytest.raises(SettingsError, match='is for the task "text-generation", not "text-classification"'):
        evaluate(decoder_bundle, data, task="text-classification")
    with pytest.raises(DataError, match="wants the columns"):
        evaluate(decoder_bundle, data)
    (tmp_path / "run").mkdir()
    write_manifest(tmp_path / "run", "run", complete=False)
    with pytest.raises(FolderError, match="has not finished training") as caught:
        evaluate(tmp_path / "run", data)
    assert caught.value.hint == f"edgelora finetune MODEL DATA -o {tmp_path / 'run'} --resume"


def test_rows_that_no_model_reads(classifier_model: Path, tmp_path: Path) -> None:
    """A run may have been given a longer limit than its model has; its own rows may have been spoiled since."""
    from edgelora.config import FinetuneConfig
    from edgelora.train.finetune import finetune

    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"number {n}", "label": ("odd", "even")[n % 2]} for n in range(30)])
    config = FinetuneConfig(max_steps=1, threads=1, base_bits=32, precision="fp32", max_length=4096)
    finetune(str(classifier_model), data, tmp_path / "run", config)
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "word " * 40, "label": "odd"}])
    with pytest.raises(DataError, match="line 1: 200 tokens, over the limit of 66"):
        evaluate(tmp_path / "run", long, threads=1)
    assert evaluate(tmp_path / "run", long, truncate=True, threads=1)["rows"] == 1
    (tmp_path / "tests").mkdir()
    write_jsonl(tmp_path / "tests" / "test.jsonl", [{"text": "number 8", "label": "odd"}])
    assert evaluate(tmp_path / "run", str(tmp_path / "tests"), threads=1)["split"] == "test"
    for content, said in (('{"te', "is damaged"), ("[]\n", "is damaged: not every line is a row"), (None, "no rows to score")):
        kept = tmp_path / "run" / "data" / "valid.jsonl"
        kept.write_text(content) if content else kept.unlink()
        with pytest.raises((FolderError, SettingsError), match=said):
            evaluate(tmp_path / "run", threads=1)


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_a_run_its_merge_and_its_bundle_score_alike(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from edgelora.config import FinetuneConfig
    from edgelora.export.export import export
    from edgelora.merging.merge import merge
    from edgelora.train.finetune import finetune

    pairs = [{"prompt": f"say {n}", "completion": f"ok {n}"} for n in range(30)]
    texts = [{"text": f"number {n}", "label": ("odd", "even")[n % 2]} for n in range(30)]
    data = write_jsonl(tmp_path / "rows.jsonl", pairs if kind == "decoder" else texts)
    config = FinetuneConfig(max_steps=4, threads=1, base_bits=32, seed=1, precision="fp32")
    model = request.getfixturevalue(f"{kind}_model")
    trained = finetune(str(model), data, tmp_path / "run", config)
    own = evaluate(tmp_path / "run", threads=1)
    assert own["split"] == "valid"
    assert own["metrics"]["loss"] == pytest.approx(trained["valid"]["loss"])
    merge(tmp_path / "run", tmp_path / "merged", precision="fp32")
    export(str(tmp_path / "merged"), tmp_path / "bundle", precision="fp32")
    results = [evaluate(tmp_path / stage, data, threads=1) for stage in ("run", "merged", "bundle")]
    assert [result["kind"] for result in results] == ["run", "merged", "bundle"]
    losses = [result["metrics"]["loss"] for result in results]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=tolerances.ONNX_FP32_LINE_LOSS)
    if kind == "decoder":  # a classifier's base has no head for these labels
        assert losses[0] < evaluate(model, data, threads=1)["metrics"]["loss"]
