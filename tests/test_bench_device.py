"""The benchmark of decoding: sides in turn on the same tokens, medians, ratios to the better peer; GGUF files that load."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # where the benchmark lies; it is no part of the package
pytest.importorskip("resource")

import readme_device
from device_bench import files, gguf_file, speed
from device_bench.sides import timing
from merge_bench import environments
from training_bench.processes import Measured
from training_bench.results import Results

FIGURES = {
    "edgelora": {"prefill_tokens_per_s": 300.0, "decode_tokens_per_s": 150.0, "load_s": 0.2, "first_token_s": 0.3},
    "llama": {"prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 120.0, "load_s": 0.4, "first_token_s": 0.5},
    "genai": {"prefill_tokens_per_s": 200.0, "decode_tokens_per_s": 60.0, "load_s": 0.5, "first_token_s": 0.6},
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder in which everything is there already, and no process is started."""
    tiny.save_tokenizer(tmp_path / "models" / "smollm2")
    (tmp_path / "models" / "smollm2" / "config.json").write_text("{}", encoding="utf-8")
    for name in ("smollm2-edgelora", "smollm2-genai", "smollm2-Q4_0.gguf"):
        (tmp_path / "device" / name).mkdir(parents=True)
    monkeypatch.setattr(files, "shipped", lambda: tmp_path / "shipped.gguf")
    monkeypatch.setattr(environments, "interpreter", lambda name, work: f"python-of-{name}")
    return tmp_path


def test_sides_take_turns_on_the_same_tokens(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, str]] = []
    requests: list[dict[str, Any]] = []

    def run(command: list[str], **_: Any) -> Measured:
        name = command[3].rpartition(".")[2]
        turns.append((command[0], name))
        requests.append(json.loads(Path(command[4]).read_text(encoding="utf-8")))
        peak = 90.0 if name == "edgelora" else 100.0
        loss = {"loss": 2.7 if name == "edgelora" else 3.0} if requests[-1]["text"] else {}
        return Measured(command, 0, 1.0, peak, peak, None, 0.0, result={**FIGURES[name], **loss, "answers": [[1]]})

    monkeypatch.setattr(speed, "run", run)
    results = Results(work / "device.json", {"commit": "abc"})
    rows = speed.measure("smollm2", results, work, bundles=[], rounds=2, threads=2, lengths=(16, 8))
    assert turns[:5] != turns[5:], "no side always follows the same one"
    environments = {"llama": "python-of-llama", "genai": "python-of-onnx"}
    for turn in (turns[:5], turns[5:]):
        assert sorted(name for _, name in turn) == ["edgelora", "edgelora", "genai", "llama", "llama"]
        assert all(python == environments[name] for python, name in turn if name != "edgelora")
    assert [len(request["text"]) for request in requests] == [speed.TEXT_TOKENS] * 5 + [0] * 5
    assert all(request["prompts"] == requests[0]["prompts"] for request in requests)
    assert [len(prompt) for prompt in requests[0]["prompts"]] == [16] * speed.PROMPTS
    assert [row["side"] for row in rows] == [
        "EdgeLoRA", "EdgeLoRA, in ONNX Runtime", "llama.cpp Q4_1", "llama.cpp Q4_0", "onnxruntime-genai",
        "EdgeLoRA / better peer", "EdgeLoRA, in ONNX Runtime / better peer",
    ]  # fmt: skip
    assert rows[-1] == {
        "side": "EdgeLoRA, in ONNX Runtime / better peer", "prefill, tok/s": 1.5, "decode, tok/s": 1.25, "load, s": 0.5,
        "and 1st prompt": 0.6, "peak, MB": 0.9, "anonymous, MB": None, "loss": 0.9,
    }  # fmt: skip
    assert results.content["parts"]["speed/smollm2"] == rows


def test_a_trimmed_bundle_gets_tokens_that_it_has_and_no_text(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def run(command: list[str], **_: Any) -> Measured:
        requests.append(json.loads(Path(command[4]).read_text(encoding="utf-8")))
        return Measured(command, 0, 1.0, 1.0, 1.0, None, 0.0, result={**FIGURES["edgelora"], "answers": [[1]]})

    monkeypatch.setattr(speed, "run", run)
    manifest = {"vocabulary": {"before": 300, "after": 50}, "decoder": {"vocab_size": 50}}
    (work / "trimmed").mkdir()
    (work / "trimmed" / "edgelora.json").write_text(json.dumps(manifest), encoding="utf-8")
    results = Results(work / "device.json", {"commit": "abc"})
    speed.measure("smollm2", results, work, bundles=[work / "trimmed"], rounds=1, threads=2, lengths=(16, 8))
    trimmed = next(request for request in requests if request["model"] == str(work / "trimmed") and request["native"])
    other = next(request for request in requests if request["model"].endswith(".gguf"))
    assert trimmed["text"] == [] != other["text"]
    assert trimmed["prompts"] == [[token % 50 for token in ids] for ids in other["prompts"]]


def test_what_the_page_shows_comes_from_results_of_one_machine(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Measured(["it"], 0, 1.0, 90.0, 90.0, None, 0.0, result={**FIGURES["edgelora"], "answers": [[1]]})
    monkeypatch.setattr(speed, "run", lambda *_, **__: done)
    machine = {"processor": "P", "architecture": "x86_64", "physical_cores": 2, "isa": ["AVX2"], "ram_mb": 8192}
    results = Results(work / "device.json", machine)
    speed.measure("smollm2", results, work, bundles=[], rounds=3, threads=2, lengths=(16, 8))
    found = readme_device.condense([work / "device.json"])
    assert found["machine"] == "2 cores of P (AVX2), x86_64, 8 GB"
    [(title, rows)] = readme_device.tables(found)
    assert title == "SmolLM2-135M: 16 tokens of prompt and 8 after it, 2 threads, medians of 3 processes of each side in turn"
    assert rows[0]["decode, tok/s"] == 150
    assert rows[0]["loss"] == "–"
    (work / "other.json").write_text((work / "device.json").read_text(encoding="utf-8").replace('"P"', '"Q"'), encoding="utf-8")
    with pytest.raises(SystemExit, match="another machine"):
        readme_device.condense([work / "device.json", work / "other.json"])


def test_a_side_that_fails_is_named(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Measured(["it"], 1, 1.0, 1.0, 1.0, None, 0.0, message="no such model")
    monkeypatch.setattr(speed, "run", lambda *_, **__: failed)
    results = Results(work / "device.json", {"commit": "abc"})
    with pytest.raises(SystemExit, match=r"(EdgeLoRA|llama\.cpp Q4_[01]|onnxruntime-genai).* failed: no such model"):
        speed.measure("smollm2", results, work, bundles=[], rounds=1, threads=2, lengths=(16, 8))


def test_a_side_times_all_prompts_but_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Counter:
        def __init__(self, request: dict[str, Any]) -> None:
            self.steps = 0

        def prefill(self, ids: list[int]) -> int:
            return ids[-1]

        def step(self, token: int) -> int:
            self.steps += 1
            return token + 1

        def logits(self, ids: list[int], *, fresh: bool) -> np.ndarray:
            return np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))

    request = {"prompts": [[1, 2], [3, 4]], "new_tokens": 3, "text": [3, 0, 1]}
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["side", str(tmp_path / "request.json")])
    timing.main(Counter)
    printed = json.loads(capsys.readouterr().out)
    assert printed["answers"] == [[2, 3, 4, 5], [4, 5, 6, 7]]
    assert printed["decode_tokens_per_s"] > 0
    assert printed["loss"] == pytest.approx((np.log(2) + np.log(4)) / 2)
    assert 0 < printed["load_s"] < printed["first_token_s"]


def test_a_gguf_of_a_random_shape_holds_its_weights(tmp_path: Path) -> None:
    import gguf
    from training_bench import models

    shape = models.QwenShape(64, 2, 2, 1, 96, 300, True)
    folder = tmp_path / "model"
    tiny.save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("", encoding="utf-8")
    (tmp_path / "made").mkdir()
    models.write_random(shape, tmp_path / "made", folder)
    donor = gguf.GGUFWriter(tmp_path / "donor.gguf", "llama")
    donor.add_tokenizer_model("gpt2")
    donor.add_token_list(["a", "b"])
    donor.add_token_types([1, 1])
    gguf_file.write(donor, [("token_embd.weight", np.ones((2, 32), np.float32), None)])
    out = tmp_path / "out.gguf"
    source = gguf.GGUFReader(tmp_path / "donor.gguf")
    writer = gguf.GGUFWriter(out, "qwen2")
    config = json.loads((tmp_path / "made" / "config.json").read_text(encoding="utf-8"))
    gguf_file.describe(writer, config, source)
    gguf_file.write(writer, gguf_file.quantized(tmp_path / "made", 2))
    read = gguf.GGUFReader(out)
    assert len(read.fields["tokenizer.ggml.tokens"].contents()) == 300
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert {"token_embd.weight", "blk.1.attn_q.bias", "blk.0.ffn_down.weight", "output_norm.weight"} <= tensors.keys()
    down = tensors["blk.0.ffn_down.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q4_0
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    assert values.shape == (64, 96)
    assert 0.015 < values.std() < 0.025


def test_a_shipped_gguf_gets_q4_0_layers(tmp_path: Path) -> None:
    import gguf

    kinds = gguf.GGMLQuantizationType
    weights = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    stored = [("blk.0.ffn_up.weight", kinds.Q4_1), ("token_embd.weight", kinds.Q8_0)]
    gguf_file.write(writer, [(name, gguf.quants.quantize(weights, kind), kind) for name, kind in stored])
    sys.argv, before = ["gguf_file", str(tmp_path / "in.gguf"), str(tmp_path / "out.gguf")], sys.argv
    try:
        gguf_file.main()
    finally:
        sys.argv = before
    read = gguf.GGUFReader(tmp_path / "out.gguf")
    assert {tensor.name: tensor.tensor_type for tensor in read.tensors} == {
        "blk.0.ffn_up.weight": kinds.Q4_0, "token_embd.weight": kinds.Q8_0,
    }  # fmt: skip
    assert read.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
