"""Ten ways to get it wrong, each with its whole message: what is wrong, what was found, what is allowed, a hint."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from edgelora.cli.main import cli

ROWS = '{"prompt": "a", "completion": "b"}\n' * 2 + '{"prompt": "c", "completion": "d"}\n'
Edgelora = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_decoder(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def edgelora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Edgelora:
    """Run a command line in an empty folder; return its exit code and its message, from "error:" on."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        return int(end.value.code or 0), printed[printed.index("error: ") :]

    return run


def test_misspelt_column(edgelora: Edgelora) -> None:
    Path("rows.jsonl").write_text(ROWS.replace("prompt", "promt"), encoding="utf-8")
    assert edgelora("data", "rows.jsonl") == (
        2,
        "error: no task has the columns completion, promt; wanted one of: prompt + completion (text-generation)\n"
        "hint: --columns prompt=promt maps our names to the data's\n",
    )


def test_truncated_safetensors(edgelora: Edgelora, model: Path) -> None:
    shutil.copytree(model, "cut")
    weights = Path("cut/model.safetensors")
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[: size - 100])
    Path("rows.jsonl").write_text(ROWS, encoding="utf-8")
    code, message = edgelora("finetune", "cut", "rows.jsonl", "-o", "run")
    assert code == 2
    assert re.fullmatch(
        r"error: cut/model\.safetensors is damaged or cut short:\n"
        rf"(  [\w.]+: ends at byte {size} of a file of {size - 100}\n)"
        r"hint: download the model again\n",
        message.replace("\\", "/"),
    )
    assert not Path("run").exists()


def test_corrupt_gguf(edgelora: Edgelora) -> None:
    Path("model.gguf").write_bytes(b"not a GGUF file at all")
    Path("rows.jsonl").write_text(ROWS, encoding="utf-8")
    assert edgelora("finetune", "model.gguf", "rows.jsonl", "-o", "run") == (
        2,
        "error: model.gguf is not a GGUF file, or is damaged: GGUF magic invalid\nhint: download it again\n",
    )


def test_label_missing(edgelora: Edgelora) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b"}, {"text": "c", "label": "y"}, {"text": "", "label": "y"}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert edgelora("data", "rows.jsonl") == (
        2,
        'error: rows.jsonl has 2 problems:\n  rows.jsonl, line 2: "label" is missing\n  rows.jsonl, line 4: "text" is empty\n'
        "hint: --columns prompt=mr,completion=ref maps our names to the data's\n",
    )


def test_full_disk(edgelora: Edgelora, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("rows.jsonl").write_text(ROWS, encoding="utf-8")
    monkeypatch.setattr(os, "fsync", full)
    code, message = edgelora("finetune", str(model), "rows.jsonl", "-o", "run", "--max-steps", "1")
    assert code == 3
    assert re.fullmatch(
        r"error: the disk is full: writing run failed with \d+ MB left\nhint: free some space\n",
        message,
    )
    assert not Path("run").exists()
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


def test_not_a_bundle(edgelora: Edgelora, model: Path) -> None:
    shutil.copytree(model, "model")
    assert edgelora("run", "model", "hello") == (
        2,
        "error: model is not a bundle folder: it has no edgelora.json\nhint: edgelora export RUN_OR_MODEL -o BUNDLE\n",
    )


def test_newer_bundle(edgelora: Edgelora) -> None:
    Path("bundle").mkdir()
    manifest = {"format": 99, "kind": "bundle", "tool_version": "9.9.0", "files": {}}
    Path("bundle/edgelora.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert edgelora("run", "bundle", "hello") == (
        2,
        "error: bundle has format 99, written by EdgeLoRA 9.9.0; this one reads up to 1\n"
        "hint: pip install --upgrade edgelora\n",
    )


def test_unknown_decoder(edgelora: Edgelora, model: Path) -> None:
    shutil.copytree(model, "llamba")
    config = Path("llamba/config.json")
    config.write_text(config.read_text(encoding="utf-8").replace('"llama"', '"llamba"'), encoding="utf-8")
    Path("rows.jsonl").write_text(ROWS, encoding="utf-8")
    assert edgelora("finetune", "llamba", "rows.jsonl", "-o", "run") == (
        2,
        'error: model type "llamba" is not a decoder that EdgeLoRA knows; known are gemma, gemma2, gemma3_text, gpt2, granite, '
        'llama, mistral, olmo2, phi3, qwen2, qwen3, smollm3. Did you mean "llama"?\n',
    )
    assert not Path("run").exists()


def test_wrong_toml_type(edgelora: Edgelora) -> None:
    Path("settings.toml").write_text('rank = "eight"\nlearning_rat = 1e-3\nbase-bits = 5\n', encoding="utf-8")
    code, message = edgelora("finetune", "model", "rows.jsonl", "-o", "run", "--config", "settings.toml")
    assert code == 2
    assert message == (
        "error: settings.toml: 3 problems\n"
        "  \"rank\" is 'eight' (str); allowed: a whole number\n"
        '  "learning_rat" is not a setting. Did you mean "learning_rate"?\n'
        '  "base-bits" is 5; allowed: 32, 16, 8, 4\n'
    )


def test_no_such_option(edgelora: Edgelora) -> None:
    assert edgelora("finetune", "model", "rows.jsonl", "-o", "run", "--rnak", "8") == (
        2,
        'error: no such option "--rnak". Did you mean "--rank"?\nhint: edgelora finetune --help\n',
    )


def test_no_such_verb(edgelora: Edgelora) -> None:
    assert edgelora("finetun", "model") == (
        2,
        'error: no such verb "finetun". Did you mean "finetune"? Verbs: doctor, plan, data, finetune, evaluate, merge, export, '
        "run, chat, serve, bench, tasks, inspect\nhint: edgelora --help\n",
    )


def test_json_carries_the_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["run", str(tmp_path / "absent"), "hello", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert end.value.code == printed["exit_code"] == 2
    assert printed["error"] == f"{tmp_path / 'absent'} is not a bundle folder: it does not exist"
