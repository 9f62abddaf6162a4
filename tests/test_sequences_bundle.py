"""Encoder-decoders through the whole line; the two graphs against torch, cached and not, greedy and by beams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sequences
from tolerances import GRAPH_FP32, ONNX_FP32_LOSS

from edgelora.config import FinetuneConfig, GenerateConfig
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.models.load import load_model
from edgelora.models.predictor import to_tensors
from edgelora.models.source import open_model
from edgelora.run.answer import run
from edgelora.run.model import load
from edgelora.run.predictor import OnnxPredictor
from edgelora.train.finetune import finetune


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 as an fp32 bundle, beside its model."""
    folder = tmp_path_factory.mktemp("t5")
    tiny_sequences.save_seq2seq(folder / "model", "t5")
    export(str(folder / "model"), folder / "bundle", precision="fp32")
    return folder / "bundle"


def test_cached_graph_is_torch(bundle: Path) -> None:
    import torch

    writer = load(bundle, threads=1).writer
    model: Any = load_model(open_model(str(bundle.with_name("model"))), "translation", base_bits=32).eval()
    examples = writer.task.trial_examples(writer.processor)
    batch = writer.task.collate(examples, writer.processor)
    ids = batch["decoder_input_ids"]
    with torch.no_grad():
        wanted = model.head.logits(model.states(to_tensors(batch))).numpy().reshape(*ids.shape, -1)
    kept = np.zeros(ids.size, bool)
    kept[batch["positions"]] = True
    kept = kept.reshape(ids.shape)
    whole = writer.read(examples).feed(ids)
    np.testing.assert_allclose(whole[kept], wanted[kept], **GRAPH_FP32)
    steps = writer.read(examples)
    parts = [steps.feed(ids[:, :3]), *(steps.feed(ids[:, i : i + 1]) for i in range(3, ids.shape[1]))]
    np.testing.assert_allclose(np.concatenate(parts, 1)[kept], wanted[kept], **GRAPH_FP32)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_bundle_writes_what_torch_writes(bundle: Path, beams: int) -> None:
    import dataclasses

    writer = load(bundle, threads=1).writer
    model: Any = load_model(open_model(str(bundle.with_name("model"))), "translation", base_bits=32).eval()
    examples = writer.task.trial_examples(writer.processor)
    settings = dataclasses.replace(writer.writing.search, num_beams=beams, max_new_tokens=10, no_repeat_ngram_size=2)
    wanted = model.write(to_tensors(writer.task.sources(examples, writer.processor)), settings)
    assert writer.write(examples, settings, batch_size=4) == wanted
    losses = OnnxPredictor(load(bundle, threads=1)).losses(examples)
    loss, count = writer.task.loss(model, to_tensors(writer.task.collate(examples, writer.processor)))
    assert sum(n for _, n in losses) == count
    assert sum(total for total, _ in losses) == pytest.approx(float(loss), rel=ONNX_FP32_LOSS)


def test_layout_is_that_of_the_loaders(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    names = ["decoder_model_merged.onnx", "encoder_model.onnx"]
    assert config["transformers.js_config"]["use_external_data_format"] == dict.fromkeys(names, 1)
    assert sorted(path.name for path in (bundle / "onnx").glob("*.onnx")) == names
    assert json.loads((bundle / "generation_config.json").read_text())["decoder_start_token_id"] == 260
    session = load(bundle, threads=1).writer.decoder
    inputs = [value.name for value in session.get_inputs()]
    assert inputs[:3] == ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]
    kept = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    assert inputs[3:] == [f"past_key_values.0.{name}" for name in kept]
    assert [value.name for value in session.get_outputs()] == ["logits", *(f"present.0.{name}" for name in kept)]
    assert [value.shape[0] for value in session.get_inputs()] == ["batch_size"] * len(inputs)


def test_the_whole_line(tmp_path: Path) -> None:
    model = tiny_sequences.save_seq2seq(tmp_path / "model", "bart")
    rows = tiny_sequences.save_words(tmp_path / "rows.jsonl")
    config = FinetuneConfig(epochs=2.0, batch_size=16, rank=8, learning_rate=2e-2, valid_rows=8, evaluations=1, threads=1)
    figures = finetune(str(model), str(rows), tmp_path / "run", config)
    base, *_, adapter = figures["table"]
    assert adapter["loss"] < 0.95 * base["loss"]
    assert {"bleu", "chrf"} <= adapter.keys()
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision="int4", force=True)
    assert exported["verify"]["passed"]
    assert exported["verify"]["layers_as_trained"] == 32  # of two layers each: attention and MLP of the encoder and decoder
    assert exported["verify"]["layers_bit_identical"] == 33  # and the table that embeddings and head share
    assert exported["table"][-1]["what"] == "onnx"
    bundle = evaluate(tmp_path / "bundle", str(rows), rows=8)["metrics"]
    assert bundle["loss"] == pytest.approx(adapter["loss"], rel=0.1)
    shown: list[str] = []
    answers = run(tmp_path / "bundle", ["red dog", "sun"], GenerateConfig(num_beams=2, max_new_tokens=8), write=shown.append)
    assert len(answers["output"]) == 2 == len(shown)
    assert shown[0] == answers["output"][0] + "\n"
