"""Convolutions in int8: calibrated on the run's pictures, shipped where they are as good and measured to be faster."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import tiny
from tolerances import INT8_ACCURACY

from edgelora.config import FinetuneConfig
from edgelora.evaluate import evaluate
from edgelora.export import int8
from edgelora.export.export import export
from edgelora.folder import read_manifest
from edgelora.train.finetune import finetune


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    tiny.save_pictures(folder / "rows", rows=45)
    model = tiny.save_vision(folder / "model", "resnet", labels=7)
    config = FinetuneConfig(epochs=6.0, batch_size=8, rank=4, learning_rate=1e-2, valid="0.3")
    finetune(str(model), str(folder / "rows"), folder / "run", config)
    return folder / "run"


def test_what_is_faster_ships_in_int8(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "times", lambda classifiers, example: [2.0, 1.0])
    monkeypatch.setattr(int8, "MOST_LOST", 1.0)
    exported = export(str(run), tmp_path / "bundle", precision="int8", force=True)
    assert exported["verify"]["passed"]
    assert (exported["precision"], exported["model_file"]) == ("int8", "onnx/model_quantized.onnx")
    assert [path.name for path in (tmp_path / "bundle" / "onnx").iterdir()] == ["model_quantized.onnx"]
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "q8"}
    manifest = read_manifest(tmp_path / "bundle", "bundle")
    assert manifest["int8"]["used"]
    assert manifest["results"][-1]["precision"] == "int8"
    graph = onnx.load(tmp_path / "bundle" / "onnx" / "model_quantized.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("DequantizeLinear") >= 2 * kinds.count("Conv") > 0
    found, wanted = (evaluate(tmp_path / "bundle", str(run.parent / "rows")), evaluate(run))
    assert found["metrics"]["accuracy"] == pytest.approx(wanted["metrics"]["accuracy"], abs=INT8_ACCURACY)


def test_what_is_no_faster_stays_in_fp32(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "times", lambda classifiers, example: [1.0, 1.0])
    exported = export(str(run), tmp_path / "bundle", precision="int8", force=True)
    assert exported["verify"]["passed"]
    assert (exported["precision"], exported["model_file"]) == ("fp32", "onnx/model.onnx")
    assert not any("quantized" in path.name for path in (tmp_path / "bundle" / "onnx").iterdir())
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["transformers.js_config"]["dtype"] == "fp32"
    figures = read_manifest(tmp_path / "bundle", "bundle")["int8"]
    assert not figures["used"]
    assert set(figures) == {"used", "ms_fp32", "ms_int8", "accuracy_fp32", "accuracy_int8"}
    assert evaluate(tmp_path / "bundle", str(run.parent / "rows"))["metrics"]["accuracy"] > 0.5
