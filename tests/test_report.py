"""The report of what ships: every row of the table, the guard, and digests from the last training step to the ONNX file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import save_decoder, save_encoder
from tolerances import LOSS_INT8_ACTIVATIONS, ONNX_FP32_LINE_LOSS

from edgelora.bundle import open_bundle
from edgelora.config import FinetuneConfig
from edgelora.errors import ModelError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.export.verify import check_codes
from edgelora.folder import MANIFEST, read_manifest, write_json, write_manifest
from edgelora.merging.merge import merge
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.report import kept, refuse_lost_gain, shown, what_keeps_more, with_kept
from edgelora.train.finetune import finetune

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
WORDS = ("red", "green", "blue")
ROWS = ("base", "fp32 adapter", "adapter", "merged fp32", "merged", "onnx")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that has learned on the int4 grid."""
    folder = tmp_path_factory.mktemp("report")
    save_decoder(folder / "model", **SIZES)
    rows = [{"prompt": f"{number}: {word[::-1]}?", "completion": word} for number in range(16) for word in WORDS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = FinetuneConfig(threads=1, max_steps=30, epochs=30, batch_size=4, learning_rate=2e-2, evaluations=1, base_bits=32)
    finetune(str(folder / "model"), str(folder / "rows.jsonl"), folder / "run", config)
    return folder / "run"


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    merge(run, run.with_name("merged"))
    return run.with_name("merged")


@pytest.fixture(scope="module")
def bundle(merged: Path) -> tuple[dict[str, Any], Path]:
    out = merged.with_name("bundle")
    return export(str(merged), out), out


def test_every_row_of_a_decoder(run: Path, bundle: tuple[dict[str, Any], Path]) -> None:
    result, out = bundle
    table = {row["what"]: row for row in result["table"]}
    assert tuple(table) == ROWS
    assert open_bundle(out).manifest["results"] == result["table"]
    assert table["fp32 adapter"]["loss"] < 0.9 * table["base"]["loss"]
    assert table["merged fp32"]["loss"] == pytest.approx(table["fp32 adapter"]["loss"], rel=ONNX_FP32_LINE_LOSS)
    assert table["merged fp32"]["agreement"] == pytest.approx(1.0, abs=0.05)
    assert table["merged fp32"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert table["onnx"]["loss"] == pytest.approx(table["merged"]["loss"], **LOSS_INT8_ACTIVATIONS)
    assert "kl" not in table["fp32 adapter"]
    assert 0 < table["adapter"]["kl"] < table["base"]["kl"]
    assert table["base"]["agreement"] < table["adapter"]["agreement"] <= 1
    assert "exact_match" in table["onnx"]
    assert [row.get("precision") for row in table.values()] == [None, None, "int4", None, "int4", "int4"]
    assert table["fp32 adapter"]["kept"] == 1.0
    assert "kept" not in table["base"]
    assert read_manifest(run, "run")["results"] == [{**table[what]} for what in ROWS[:3]]


def test_evaluate_gives_the_rows_of_the_table(run: Path, merged: Path, bundle: tuple[dict[str, Any], Path]) -> None:
    table = {row["what"]: row for row in bundle[0]["table"]}
    own = str(run / "data" / "valid.jsonl")
    found = {
        "fp32 adapter": evaluate(run, float_=True, generate=False),
        "adapter": evaluate(run, generate=False),
        "merged": evaluate(merged, own, generate=False),
        "onnx": evaluate(bundle[1], own, generate=False),
    }
    for what, result in found.items():
        assert result["metrics"]["loss"] == pytest.approx(table[what]["loss"], rel=ONNX_FP32_LINE_LOSS), what


def test_a_classifier_has_its_majority_and_its_accuracy_in_every_row(tmp_path: Path) -> None:
    save_encoder(tmp_path / "model", base_only=True)
    rows = [{"text": f"{word} {number}", "label": word} for number in range(12) for word in ("red", "green", "blue")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = FinetuneConfig(threads=1, max_steps=8, epochs=8, batch_size=8, learning_rate=1e-2, evaluations=1, valid="0.3")
    finetune(str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), tmp_path / "run", config)
    result = merge(tmp_path / "run", tmp_path / "merged", force=True)  # so few steps keep little of their gain
    table = {row["what"]: row for row in result["results"]}
    assert tuple(table) == ("majority baseline", *ROWS[:-1])
    assert all("accuracy" in row for row in table.values())
    assert table["majority baseline"]["accuracy"] == pytest.approx(1 / 3, abs=0.1)
    assert table["merged fp32"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert table["merged"]["agreement"] >= 0.5
    assert not any("report" in row for row in table.values())


def test_digests_go_from_the_last_step_to_the_bundle(run: Path, merged: Path, bundle: tuple[dict[str, Any], Path]) -> None:
    trained = read_manifest(run, "run")["grid"]["digests"]
    manifest = read_manifest(merged, "merged")
    assert set(read_manifest(run, "run")["grid"]["bits"]) <= set(trained)
    assert manifest["as_trained"] == sorted(trained)
    assert set(manifest["digests"]) == set(manifest["layers"])
    assert trained.items() <= manifest["digests"].items()
    assert bundle[0]["verify"]["layers_bit_identical"] == len(manifest["layers"])
    assert bundle[0]["verify"]["layers_as_trained"] == len(trained)


@pytest.fixture
def copies(run: Path, merged: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The run and its merged folder, to be spoiled."""
    for folder in (run, merged):
        shutil.copytree(folder, tmp_path / folder.name)
    manifest = read_manifest(tmp_path / "merged", "merged")
    write_json(tmp_path / "merged" / MANIFEST, {**manifest, "run": str(tmp_path / "run")})
    return tmp_path / "run", tmp_path / "merged"


def spoil(folder: Path, path: str, part: str) -> None:
    """Change one byte of a layer's codes or scales in a merged folder, and let the manifest know the file as it is then."""
    tensor = getattr(MergedCheckpoint.open(folder).read_linear(path), part).numpy().tobytes()
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[content.index(tensor) + 6] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    manifest = read_manifest(folder, "merged")
    write_manifest(folder, "merged", **{key: value for key, value in manifest.items() if key not in FIXED})


FIXED = ("format", "kind", "tool_version", "complete", "files")


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_a_merged_folder_that_was_changed_is_not_exported(copies: tuple[Path, Path], part: str, tmp_path: Path) -> None:
    path = "model.layers.1.mlp.down_proj"
    spoil(copies[1], path, part)
    with pytest.raises(ModelError) as caught:
        export(str(copies[1]), tmp_path / "bundle")
    assert f"  {path}: the codes or scales are not those that were trained or merged" in caught.value.message.splitlines()
    assert not (tmp_path / "bundle").exists()


def test_a_merged_folder_with_forged_digests_is_not_exported(copies: tuple[Path, Path], tmp_path: Path) -> None:
    """Whoever changes weights and manifest alike cannot change the run's."""
    from edgelora.merging.shipped import digests

    path = "model.layers.0.self_attn.o_proj"
    spoil(copies[1], path, "codes")
    manifest = read_manifest(copies[1], "merged")
    write_json(copies[1] / MANIFEST, {**manifest, "digests": digests(MergedCheckpoint.open(copies[1]))})
    with pytest.raises(ModelError, match=rf"{path}: the codes or scales are not those that were trained"):
        export(str(copies[1]), tmp_path / "bundle")


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_an_onnx_file_that_was_changed_is_found(part: str, merged: Path, bundle: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(bundle[1] / "onnx", tmp_path / "onnx")
    path, checkpoint = "model.layers.1.mlp.up_proj", MergedCheckpoint.open(merged)
    nodes = open_bundle(bundle[1]).manifest["nodes"]
    file = tmp_path / "onnx" / "model_q4.onnx"
    assert check_codes(file, nodes, checkpoint, checkpoint.manifest["digests"]) == len(checkpoint.layers)
    tensor = np.ascontiguousarray(getattr(checkpoint.read_linear(path), part).numpy()).tobytes()
    holder = next(name for name in (file.with_suffix(".onnx_data"), file) if tensor in name.read_bytes())
    content = bytearray(holder.read_bytes())
    content[content.index(tensor) + 6] ^= 1
    holder.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        check_codes(file, nodes, checkpoint)
    assert f"  {path}: the {part} in model_q4.onnx are not the merged folder's" in caught.value.message.splitlines()


def test_a_merge_of_other_weights_than_were_trained_is_refused(copies: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = read_manifest(copies[0], "run")
    path = "model.layers.0.mlp.gate_proj"
    manifest["grid"]["digests"][path] = "0" * 64
    write_json(copies[0] / MANIFEST, manifest)
    with pytest.raises(ModelError) as caught:
        merge(copies[0], tmp_path / "out")
    assert caught.value.message.splitlines()[1:] == [f"  {path}"]
    assert not (tmp_path / "out").exists()
    merge(copies[0], tmp_path / "out", precision="int8")  # which is another grid than was trained on
    assert read_manifest(tmp_path / "out", "merged")["as_trained"] == []


def with_losses(run: Path, **losses: float) -> None:
    """Let a run say other losses than it has found."""
    manifest = read_manifest(run, "run")
    for row in manifest["results"]:
        row["loss"] = losses.get(row["what"].split()[0], row["loss"])
    write_json(run / MANIFEST, manifest)


def test_a_merge_that_loses_too_much_is_refused(copies: tuple[Path, Path], tmp_path: Path) -> None:
    with_losses(copies[0], base=6.0, fp32=0.01)
    with pytest.raises(ModelError) as caught:
        merge(copies[0], tmp_path / "out", precision="int4")
    first, figures, *more = caught.value.message.splitlines()
    assert first.endswith("of what was learned is left; at least 90% is wanted")
    assert figures.startswith("  held-out loss 6 before training, 0.01 with the adapter unrounded, ")
    assert any("--precision int8" in text for text in more)
    assert "--force" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    result = merge(copies[0], tmp_path / "out", precision="int4", force=True)
    assert result["results"][-1]["kept"] < 0.9
    with pytest.raises(ModelError, match="of what was learned is left"):
        export(str(tmp_path / "out"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert export(str(tmp_path / "out"), tmp_path / "bundle", force=True)["table"][-1]["kept"] < 0.9


TABLE = [{"what": "base", "loss": 2.0}, {"what": "fp32 adapter", "loss": 1.0}, {"what": "adapter", "loss": 1.1}]


def test_the_guard(capsys: pytest.CaptureFixture[str]) -> None:
    fine = [*TABLE, {"what": "merged", "loss": 1.1}]
    assert kept(fine, fine[-1]) == pytest.approx(0.9)
    refuse_lost_gain([*fine[:2], {"what": "merged", "loss": 1.0999}], "merged", [], force=False)
    for loss in (1.11, 2.5, float("nan")):
        with pytest.raises(ModelError, match="of what was learned is left; at least 90% is wanted"):
            refuse_lost_gain([*TABLE, {"what": "merged", "loss": loss}], "merged", [], force=False)
    assert capsys.readouterr().err == ""
    refuse_lost_gain([*TABLE, {"what": "merged", "loss": 1.5}], "merged", [], force=True)
    assert capsys.readouterr().err.startswith("warning: 50% of what was learned is left")


def test_an_adapter_that_is_broken_does_not_ship() -> None:
    table = [{"what": "base", "loss": 2.0}, {"what": "adapter", "loss": float("nan")}, {"what": "merged", "loss": 2.0}]
    with pytest.raises(ModelError, match="the adapter computes nothing: held-out loss 2 before training, nan with"):
        refuse_lost_gain(table, "merged", [], force=True)


@pytest.mark.parametrize(("adapter", "text"), [(2.1, "is no better than the base"), (1.99, "gains too little to tell")])
def test_where_nothing_was_learned_no_share_is_told(adapter: float, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = [{"what": "base", "loss": 2.0}, {"what": "adapter", "loss": adapter}, {"what": "merged", "loss": 3.0}]
    refuse_lost_gain(table, "merged", [], force=False)
    assert f"warning: the adapter {text}" in capsys.readouterr().err
    assert not any("kept" in row for row in with_kept(table))


def test_a_table_without_losses_is_not_judged() -> None:
    table = [{"what": "majority baseline", "accuracy": 0.5}, {"what": "merged", "loss": 3.0}]
    refuse_lost_gain(table, "merged", [], force=False)
    assert with_kept(table) == table


def test_advice_names_what_was_not_done() -> None:
    untrained = " ".join(what_keeps_more("int4", {}, calibrated=False))
    assert all(word in untrained for word in ("--precision int8", "--calibrate ROWS", "finetune … --precision int4"))
    assert "--calibrate" not in " ".join(what_keeps_more("int4", {"precision": "int4"}, calibrated=False))
    assert "next to no loss" not in " ".join(what_keeps_more("int8", {}, calibrated=True))


def test_people_read_what_a_row_is() -> None:
    rows = shown(with_kept([*TABLE, {"what": "onnx", "loss": 1.05, "precision": "int4", "agreement": 0.953, "kl": 0.02}]))
    assert [row["held-out rows"] for row in rows] == ["base", "adapter, not rounded", "adapter", "int4 bundle, ONNX Runtime"]
    assert rows[-1] == {
        "held-out rows": "int4 bundle, ONNX Runtime", "loss": 1.05, "gain kept": "95.0%", "same top-1": "95.3%", "KL": 0.02,
    }  # fmt: skip
    assert list(rows[0].items()) == [
        ("held-out rows", "base"), ("loss", 2.0), ("gain kept", None), ("same top-1", None), ("KL", None),
    ]  # fmt: skip
    assert shown([{"what": "base", "base_bits": 8, "loss": 1.0}]) == [{"held-out rows": "base (8 bits)", "loss": 1.0}]
