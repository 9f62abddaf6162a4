"""Loaders that are not ours, with a base for many adapters: they run the base, and onnxruntime-genai its adapters too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edgelora.export.onto import add_adapter
from edgelora.run.model import load
from tests.test_swap import IDS, a_run, copy


@pytest.fixture(scope="module")
def bundle(swap_base: Path, decoder_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loaders")
    add_adapter(a_run(folder / "lights", decoder_model), copy(swap_base, "fp32", folder / "bundle"))
    return folder / "bundle"


def greedy(bundle: Path, adapter: str | None, count: int) -> list[int]:
    decoder = load(bundle, threads=1, adapter=adapter).generator.decoder
    tokens = [int(decoder.prefill(IDS).argmax())]
    while len(tokens) < count:
        tokens.append(int(decoder.step(tokens[-1]).argmax()))
    return tokens


def test_the_graph_asks_for_nothing_but_a_decoders_inputs(bundle: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(bundle / "onnx" / "model.onnx"), options)
    caches = {f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")}
    assert {value.name for value in session.get_inputs()} == {"input_ids", "attention_mask", *caches}
    assert len(session.get_overridable_initializers()) == 1 + 2 * 2 * 4  # the selector; A and B of four products of two layers
    assert len(list((bundle / "onnx").glob("*.onnx"))) == 1


def test_onnxruntime_applies_the_file_by_itself(bundle: Path) -> None:
    """`LoraAdapter` with `run`, as C, C# and Java have it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(bundle / "onnx" / "model.onnx"), options)
    ids = np.array([IDS])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "num_logits_to_keep": np.array(0)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    adapter = ort.LoraAdapter()
    adapter.Load(str(bundle / "adapters" / "lights.onnx_adapter"))
    chosen = ort.RunOptions()
    chosen.add_active_adapter(adapter)
    decoder = load(bundle, threads=1, adapter="lights").generator.decoder
    np.testing.assert_allclose(session.run(["logits"], feeds, chosen)[0][0], decoder.score(IDS), rtol=1e-4, atol=1e-4)


def test_genai_runs_the_base_and_its_adapters(bundle: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(bundle))
    adapters = og.Adapters(model)
    adapters.load(str(bundle / "adapters" / "lights.onnx_adapter"), "lights")
    found: dict[str | None, list[int]] = {}
    for name in (None, "lights"):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(IDS) + 8, do_sample=False, batch_size=1)
        generator = og.Generator(model, params)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array([IDS], np.int32))
        tokens: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        found[name] = tokens
        assert tokens == greedy(bundle, name, 8)[: len(tokens)]
    assert found[None] != found["lights"]
