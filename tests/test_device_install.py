"""The device install: an environment with the package's own dependencies only, without torch and transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgelora

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "safetensors", "sklearn", "optimum")
Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def device_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment into which the package was installed as a user on a device does."""
    folder = tmp_path_factory.mktemp("device")
    source = folder / "source"  # a copy: building writes into the source tree
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "edgelora", source / "edgelora", ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(source)]
    done = subprocess.run(install, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return python


@pytest.fixture(scope="module")
def on_device(device_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Run `edgelora … --json` there, outside of the source tree, and return its JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(device_python), "-m", "edgelora", *arguments, "--json"],
            capture_output=True, text=True, encoding="utf-8", check=False, cwd=tmp_path_factory.getbasetemp(), env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    return run


def test_nothing_heavy_is_there(device_python: Path) -> None:
    code = f"from importlib.util import find_spec; print([name for name in {HEAVY} if find_spec(name)])"
    done = subprocess.run([str(device_python), "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_decoder_runs_there(on_device: Command, decoder_bundle: Path) -> None:
    result = on_device("run", str(decoder_bundle), "hello", "--max-new-tokens", "8")
    assert result["output"] == edgelora.load(decoder_bundle).generate("hello", max_new_tokens=8)


def test_a_classifier_runs_there(on_device: Command, classifier_bundle: Path) -> None:
    result = on_device("run", str(classifier_bundle), "where is my card?")
    wanted = edgelora.load(classifier_bundle).classify(["where is my card?"])[0]
    assert [(entry["label"], pytest.approx(entry["probability"])) for entry in result["output"]] == wanted


def test_evaluate_and_bench_work_there(on_device: Command, decoder_bundle: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hello", "completion": "you"}\n', encoding="utf-8")
    result = on_device("evaluate", str(decoder_bundle), str(rows))
    assert result["rows"] == 1
    assert result["metrics"]["loss"] > 0
    assert on_device("bench", str(decoder_bundle), "--threads", "1")["decode_tokens_per_s"] > 0


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_run_imports_nothing_heavy_where_it_is_there(kind: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(f"{kind}_bundle")
    code = (
        "import sys\n"
        "sys.argv = ['edgelora', 'run', sys.argv[1], 'hello', '--json', '--max-new-tokens', '4']\n"
        "from edgelora.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "output" in json.loads(done.stdout)
    assert done.stderr.strip().splitlines()[-1] == "[]"
