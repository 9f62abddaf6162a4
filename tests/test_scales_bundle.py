"""A scales delta over a base bundle computes what the run's own bundle does, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import save_encoder

from edgelora.bundle import open_bundle
from edgelora.config import FinetuneConfig
from edgelora.errors import FolderError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.export.onto import graph_layers
from edgelora.export.scales import apply
from edgelora.merging.merge import merge
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.grid import QuantizedTensor
from edgelora.scales_delta import FILE, read_delta, write_delta
from edgelora.train.finetune import finetune
from tests.test_scales import rows, run

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
__all__ = ["rows", "run"]


@pytest.fixture(scope="module")
def bundles(run: Path) -> tuple[Path, Path]:
    """Return the bundles of the run and of its base."""
    export(str(run), run.parent / "own", force=True)
    export(str(run.parent / "model"), run.parent / "base", force=True)
    return run.parent / "own", run.parent / "base"


def logits(bundle: Path) -> Array:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # num_logits_to_keep is an initializer and an input on purpose
    session = ort.InferenceSession(open_bundle(bundle).model_path, options, providers=["CPUExecutionProvider"])
    ids = np.array([[1, 5, 9, 200, 31, 7]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "num_logits_to_keep": np.array(0)}
    past = [value for value in session.get_inputs() if value.name.startswith("past")]
    empty = {value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32) for value in past}
    found: Array = session.run(["logits"], {**feeds, **empty})[0]
    return found


def test_the_delta_on_the_base_bundle_is_the_bundle_of_the_run(run: Path, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    own, base = bundles
    apply(base, run, tmp_path / "applied")
    ours, shipped, before = (graph_layers(open_bundle(folder)) for folder in (tmp_path / "applied", own, base))
    assert set(ours) == set(shipped)
    for path, layer in ours.items():
        assert np.array_equal(layer.codes, shipped[path].codes), path
        assert np.array_equal(layer.scales, shipped[path].scales), path
    assert any(not np.array_equal(layer.scales, before[path].scales) for path, layer in ours.items())
    assert np.array_equal(logits(tmp_path / "applied"), logits(own))
    assert not np.array_equal(logits(base), logits(own))


def test_a_delta_of_another_base_is_refused(run: Path, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    delta = read_delta(run)
    path = next(iter(delta.scales))
    write_delta(tmp_path / FILE, replace(delta, layers={**delta.layers, path: "0" * 64}))
    with pytest.raises(FolderError, match=f"trained with other codes than those of .*\n  {path}: other codes"):
        apply(bundles[1], tmp_path / FILE, tmp_path / "applied")
    assert not (tmp_path / "applied").exists()


@pytest.mark.parametrize("labels", [0, 3])
def test_an_encoder_keeps_its_trained_head_beside_the_scales(labels: int, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", labels=labels or 2, base_only=not labels)
    lines = [json.dumps({"text": f"{word} {n}", "label": word}) for n in range(8) for word in ("one", "two", "six")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = FinetuneConfig(method="scales", threads=1, max_steps=2, batch_size=4, evaluations=1, learning_rate=0.05)
    finetune(str(model), str(tmp_path / "rows.jsonl"), tmp_path / "run", config)
    delta = read_delta(tmp_path / "run")
    assert "classifier.weight" in delta.tensors
    merge(tmp_path / "run", tmp_path / "merged")
    merged = MergedCheckpoint.open(tmp_path / "merged")
    for path, scales in delta.scales.items():
        layer = merged.read_linear(path)
        assert isinstance(layer, QuantizedTensor)
        assert np.array_equal(layer.scales, scales), path
    assert np.array_equal(merged.read("classifier.weight"), delta.tensors["classifier.weight"])
    rows = str(tmp_path / "run" / "data" / "valid.jsonl")
    trained, shipped = (evaluate(tmp_path / name, rows)["metrics"]["loss"] for name in ("run", "merged"))
    assert shipped == pytest.approx(trained, rel=1e-2)  # the embedding is fp32 in training, and 8 bits in what ships
