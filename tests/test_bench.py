"""What `bench` measures, on tiny bundles: every figure, from a process of its own; a broken bundle is a message."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from edgelora import bench as bench_module
from edgelora import operators
from edgelora.bench import bench, in_child
from edgelora.errors import FolderError, MachineError
from edgelora.export.onto import add_adapter
from edgelora.hardware import rss_mb
from tests.test_swap import a_run

SHARED = {
    "engine",
    "engine_reason",
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


@pytest.fixture
def events() -> list[dict[str, Any]]:
    """Two runs of a prompt and two of a token, of one product, one attention, and 5 µs of neither."""
    found: list[dict[str, Any]] = [{"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 9}]
    for number, (tokens, product) in enumerate([(8, 90), (1, 40), (8, 20), (1, 10)]):
        at = 100 * (number + 1)
        inputs = [{"float": [1, tokens, 48]}]
        for place, (name, operator, us) in enumerate(
            [("m.3.q+k/x", "MatMulNBits", product), ("m.3/a", "GroupQueryAttention", 5)]
        ):
            args = {"op_name": operator, "input_type_shape": inputs}
            found.append({"cat": "Node", "name": f"{name}_kernel_time", "ts": at + place, "dur": us, "args": args})
        found.append({"cat": "Session", "name": "model_run", "ts": at - 1, "dur": product + 10})
    return found


def test_operators_of_the_second_half_of_each_kind_of_run(events: list[dict[str, Any]]) -> None:
    rows = operators.table(operators.runs(events))
    assert {row["run"] for row in rows} == {"8 tokens", "one token"}
    prompt = {row["operator"]: (row["nodes"], row["ms"], row["percent"]) for row in rows if row["run"] == "8 tokens"}
    assert prompt == {
        "MatMulNBits q+k": (1, 0.02, 66.7), "GroupQueryAttention": (1, 0.005, 16.7), "between the nodes": (0, 0.005, 16.7),
        "all of it": (2, 0.03, 100.0),
    }  # fmt: skip


def test_operators_of_a_bundle(decoder_bundle: Path, classifier_bundle: Path) -> None:
    rows = operators.operators(decoder_bundle, threads=1)
    assert {row["run"] for row in rows} == {"256 tokens", "one token"}
    attention = [row for row in rows if row["operator"] == "GroupQueryAttention"]
    assert [row["nodes"] for row in attention] == [2, 2]
    for run in ("256 tokens", "one token"):
        own = [row for row in rows if row["run"] == run]
        assert sum(row["percent"] for row in own[:-1]) == pytest.approx(100, abs=1)
    assert {row["run"] for row in operators.operators(classifier_bundle, threads=1)} == {"one input"}
