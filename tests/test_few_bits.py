"""2 bits, and 2 and 4 half and half, the whole line: trained on that grid, exported, and scored by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
from tolerances import LOSS_INT8_ACTIVATIONS

from edgelora.bundle import open_bundle
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.folder import read_manifest
from tests.test_on_grid import train


@pytest.mark.parametrize(("precision", "allowed"), [("int2", {2, 4}), ("int3", {2, 4})])
def test_what_was_trained_with_few_bits_ships(tmp_path: Path, precision: str, allowed: set[int]) -> None:
    run = train(tmp_path, precision=precision, base_bits=32).folder
    bits = read_manifest(run, "run")["grid"]["bits"]
    assert set(bits.values()) <= allowed | {8}
    assert 2 in bits.values()
    if precision == "int3":
        assert 4 in bits.values()
    # Four steps on a random model gain nothing that could be kept.
    assert export(str(run), tmp_path / "bundle", precision=precision, force=True)["verify"]["passed"]
    assert open_bundle(tmp_path / "bundle").manifest["precision"] == precision
    rows = str(tmp_path / "rows.jsonl")
    of_run, of_bundle = (evaluate(str(folder), rows)["metrics"]["loss"] for folder in (run, tmp_path / "bundle"))
    assert of_bundle == pytest.approx(of_run, **LOSS_INT8_ACTIVATIONS)
