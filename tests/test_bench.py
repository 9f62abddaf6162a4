"""What `bench` measures, on tiny bundles: every figure, from a process of its own; a broken bundle is a message."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgelora import bench as bench_module
from edgelora.bench import bench, in_child
from edgelora.errors import FolderError, MachineError
from edgelora.export.onto import add_adapter
from edgelora.hardware import rss_mb
from tests.test_swap import a_run

SHARED = {
    "bundle",
    "task",
    "precision",
    "threads",
    "load_s",
    "peak_rss_mb",
    "size_mb",
    "read_gb_s",
    "bandwidth_percent",
    "table",
}


def test_a_decoder(decoder_bundle: Path) -> None:
    result = bench(decoder_bundle, threads=1, repeats=1)
    assert set(result) == SHARED | {"prefill_tokens_per_s", "decode_tokens_per_s"}
    assert result["prefill_tokens_per_s"] > result["decode_tokens_per_s"] > 0
    assert 0 < result["load_s"] < 60
    # This process holds torch; the child holds numpy, onnxruntime and a tiny model.
    assert 20 < result["peak_rss_mb"] < min(200, rss_mb())
    assert [row["measured"] for row in result["table"]][2:4] == ["prompt of 256, tokens/s", "128 tokens after it, tokens/s"]


def test_a_classifier(classifier_bundle: Path) -> None:
    result = bench(classifier_bundle, threads=1, repeats=1)
    assert set(result) == SHARED | {"ms_per_input"}
    assert result["ms_per_input"] > 0


def test_medians_over_the_repeats(decoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([{"decode_tokens_per_s": speed, "peak_rss_mb": 60.0} for speed in (10.0, 90.0, 20.0)])
    monkeypatch.setattr(bench_module, "in_child", lambda *_: next(figures))
    result = bench(decoder_bundle)
    assert result["decode_tokens_per_s"] == 20.0
    weights = sum(path.stat().st_size for path in (decoder_bundle / "onnx").iterdir())
    assert result["bandwidth_percent"] == pytest.approx(100 * 20 * weights / 1e9 / result["read_gb_s"], abs=0.05)


def test_a_damaged_bundle_is_a_message(decoder_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(decoder_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FolderError, match=r"tokenizer.json: changed"):
        bench(tmp_path / "bundle")
    with pytest.raises(MachineError, match=r"measuring .*bundle failed: .*bundle is damaged:\n  tokenizer.json: changed"):
        in_child(tmp_path / "bundle", 1)


def test_adapters_and_other_bundles_beside_the_base(
    swap_base: Path, decoder_model: Path, decoder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(swap_base / "fp32", tmp_path / "base")
    add_adapter(a_run(tmp_path / "lights", decoder_model), tmp_path / "base")
    result = bench(tmp_path / "base", others=[decoder_bundle], threads=1, repeats=1)
    assert [(row["way"], row["bundle"], row["adapter"]) for row in result["ways"]] == [
        ("base", "base", None), ("swap", "base", "lights"), ("base", "bundle", None),
    ]  # fmt: skip
    assert all(row["decode_tokens_per_s"] > 0 and row["prefill_percent"] > 0 for row in result["ways"])
    assert result["ways"][0]["decode_percent"] == 100.0
    speeds = iter([100.0, 50.0, 80.0, 40.0, 30.0, 90.0, 120.0, 90.0, 60.0])  # three rounds of three ways
    monkeypatch.setattr(bench_module, "in_child", lambda *_: {"decode_tokens_per_s": next(speeds)})
    ways = bench(tmp_path / "base", others=[decoder_bundle])["ways"]
    assert [row["decode_percent"] for row in ways] == [100.0, 75.0, 80.0]
    assert [row["decode_tokens_per_s"] for row in ways] == [100.0, 50.0, 80.0]
