"""What is refused of adapters and base bundles: names, damage, other models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from edgelora.errors import FolderError, SettingsError
from edgelora.export.export import export
from edgelora.export.onto import add_adapter
from edgelora.folder import sha256
from edgelora.merging.merge import merge
from edgelora.run.model import load
from tests.test_swap import a_run, copy, scales_run


def test_scales_of_other_codes_are_refused(swap_base: Path, decoder_model: Path, tmp_path: Path) -> None:
    merge(None, tmp_path / "merged", model=str(tiny.save_decoder(tmp_path / "model", head_dim=16, seed=1)))
    run, *_ = scales_run(tmp_path / "run", tmp_path / "merged", decoder_model)
    with pytest.raises(FolderError, match="other codes"):
        add_adapter(run, swap_base / "int4")


def test_names_that_a_bundle_does_not_have(swap_base: Path, decoder_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load(swap_base / "fp32", adapter="lights")
    assert caught.value.message == f"{swap_base / 'fp32'} has no adapters"
    assert caught.value.hint == f"edgelora export RUN --onto {swap_base / 'fp32'} adds one"
    bundle = copy(swap_base, "fp32", tmp_path / "bundle")
    add_adapter(a_run(tmp_path / "lights", decoder_model), bundle)
    with pytest.raises(SettingsError, match=r'has no adapter "light"\. Did you mean "lights"\? It has lights'):
        load(bundle, adapter="light")
    with pytest.raises(SettingsError, match='has an adapter "lights" already'):
        add_adapter(tmp_path / "lights", bundle)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", ".hidden", "a b", "a\\b", "", "x" * 65])
def test_names_that_lead_elsewhere_are_refused(swap_base: Path, decoder_model: Path, tmp_path: Path, name: str) -> None:
    run = a_run(tmp_path / "..evil", decoder_model)  # the folder's name is the default
    with pytest.raises(SettingsError, match="cannot be the name of an adapter"):
        add_adapter(run, swap_base / "fp32", name=name)
    assert not (swap_base / "fp32" / "adapters").exists()


def test_an_entry_that_leads_outside_is_refused(swap_base: Path, decoder_model: Path, tmp_path: Path) -> None:
    bundle = copy(swap_base, "fp32", tmp_path / "bundle")
    add_adapter(a_run(tmp_path / "one", decoder_model), bundle)
    manifest = json.loads((bundle / "edgelora.json").read_text(encoding="utf-8"))
    manifest["adapters"]["one"]["file"] = "../one/adapter_model.safetensors"
    (bundle / "edgelora.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(FolderError, match="points outside of"):
        load(bundle, adapter="one")


def test_runs_of_other_models_tasks_and_kinds_are_refused(swap_base: Path, decoder_model: Path, tmp_path: Path) -> None:
    other = tiny.save_decoder(tmp_path / "model", head_dim=16, seed=1)
    with pytest.raises(FolderError, match=r"does not fit .*: it was trained on .*, and their weights differ"):
        add_adapter(a_run(tmp_path / "other", other), swap_base / "int4")
    with pytest.raises(SettingsError, match=r"is for text-classification, .* for text-generation"):
        add_adapter(a_run(tmp_path / "task", decoder_model, task="text-classification"), swap_base / "int4")
    export(str(swap_base / "merged"), tmp_path / "plain")
    with pytest.raises(SettingsError, match="has no place for adapters"):
        add_adapter(a_run(tmp_path / "run", decoder_model), tmp_path / "plain")
    with pytest.raises(SettingsError, match="--adapters swap makes a base bundle"):
        export(str(tmp_path / "run"), tmp_path / "out", adapters="swap")
    with pytest.raises(SettingsError, match="--adapters static keeps the adapter of a run"):
        export(str(decoder_model), tmp_path / "out", adapters="static")


@pytest.mark.parametrize("damage", ["cut", "noise", "shape", "foreign"])
def test_damaged_files_are_messages(swap_base: Path, decoder_model: Path, tmp_path: Path, damage: str) -> None:
    import onnxruntime as ort

    bundle = copy(swap_base, "fp32", tmp_path / "bundle")
    file = bundle / add_adapter(a_run(tmp_path / "one", decoder_model), bundle)["file"]
    if damage in ("cut", "noise"):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"noise" * 99)
    else:
        values = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
        name = next(iter(values)) if damage == "shape" else "foreign.lora_A"
        values[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros((3, 3), np.float32))
        container = ort.AdapterFormat()
        container.set_parameters(values)
        container.export_adapter(str(file))
    with pytest.raises(FolderError, match=r"adapters/one\.onnx_adapter: changed"):
        load(bundle, adapter="one")
    manifest = json.loads((bundle / "edgelora.json").read_text(encoding="utf-8"))
    manifest["files"]["adapters/one.onnx_adapter"] = sha256(file)
    (bundle / "edgelora.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(FolderError, match=r"one\.onnx_adapter (is damaged|does not fit the bundle's graph)"):
        load(bundle, adapter="one")
