"""What tests of the benchmark of merging share: rows, a work folder, and processes that are not started."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # where the benchmark lies; it is no part of the package
pytest.importorskip("resource")

from merge_bench import environments, score
from merge_bench.bench import Bench
from training_bench.processes import Measured
from training_bench.results import Results

MACHINE = {"commit": "abc"}


@pytest.fixture
def e2e_file(tmp_path: Path) -> Path:
    path = tmp_path / "e2e.csv"
    lines = [f'"name[Inn {i // 3}], area[city]","The Inn {i // 3} is in the city, {i}."' for i in range(300)]
    path.write_text("\n".join(["mr,ref", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def banking_file(tmp_path: Path) -> Path:
    path = tmp_path / "banking.csv"
    lines = [f"question {i},label {i % 5}" for i in range(200)]
    path.write_text("\n".join(["text,category", *lines, *lines[:10]]) + "\n", encoding="utf-8")
    return path


def measured(**result: Any) -> Measured:
    return Measured(["it"], 0, 1.0, 10.0, 10.0, None, 0.0, result=result)


def make_bench(work: Path, runner: Callable[..., Measured], **given: Any) -> Bench:
    work.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"steps": 5, "rows": 4, "threads": 1, **given}
    return Bench(work, Results(work / "merge.json", MACHINE), runner=runner, **settings)


def runner_of(losses: dict[str, float], calls: list[list[str]], failing: str = "") -> Callable[..., Measured]:
    """Return a runner whose processes write what they are asked for, and whose scores are `losses` by the model's folder."""

    def runner(words: list[str], **_: Any) -> Measured:
        calls.append(words)
        if failing and any(failing in word for word in words):
            return Measured(words, 1, 1.0, 10.0, 10.0, None, 0.0, message="error: it did not work")
        if str(score.__file__) in words:
            place = Path(words[words.index("torch" if "torch" in words else "onnx") + 1])
            return measured(loss=next(loss for name, loss in losses.items() if name in place.parts))
        if "evaluate" in words:
            return measured(metrics={"loss": losses["peft-merged-ours"]})
        for word in words:
            if word.startswith(f"{words[0]}") or "merge/5-steps" not in word.replace("\\", "/"):
                continue
            Path(word).mkdir(parents=True, exist_ok=True)
            (Path(word) / "edgelora.json").write_text('{"model_file": "onnx/model_q4.onnx"}', encoding="utf-8")
        return measured(tool="tool 1.0", size_mb=100.0)

    return runner


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder with a tiny tokenizer in the place of SmolLM2, and no environments."""
    import tiny

    model = tmp_path / "work" / "models" / "smollm2"
    tiny.save_tokenizer(model)
    (model / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(environments, "interpreter", lambda name, work: f"python-of-{name}")
    return tmp_path / "work"
