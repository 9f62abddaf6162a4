"""The embedded SmolLM2 as an int4 bundle: it answers, the cache changes nothing, and losses agree however they are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgelora
from edgelora.config import GenerateConfig
from edgelora.run import decoder as decoder_module
from edgelora.run.generate import prompt_ids
from edgelora.run.model import Model
from edgelora.run.predictor import OnnxPredictor
from edgelora.tasks import get_task


@pytest.fixture(scope="module")
def model(smollm2_bundle: Path) -> Model:
    return edgelora.load(smollm2_bundle)


def test_it_knows_the_capital_of_france(model: Model) -> None:
    answer = model.answer("What is the capital of France?", max_new_tokens=40)
    assert "Paris" in answer.text
    assert answer.finish == "end"
    assert not model.generator.tokenizer.doubled_bos(answer.prompt)


def test_pieces_are_the_text_of_the_tokens(model: Model) -> None:
    answer = model.start("Write the word hello in French, Japanese and Russian, with an emoji.", max_new_tokens=60)
    pieces = list(answer)
    assert "".join(pieces) == answer.text
    assert model.generator.tokenizer.decode(answer.tokens).startswith(answer.text)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_second_turn_on_the_cache_is_a_second_turn_afresh(model: Model) -> None:
    config = GenerateConfig(max_new_tokens=12)
    first = {"role": "user", "content": "Name a fruit."}
    messages = [first, {"role": "assistant", "content": model.generate([first], config)}, {"role": "user", "content": "Why?"}]
    on_cache = model.answer(messages, config)
    model.generator.forget()
    ids = prompt_ids(model.generator.tokenizer, messages, config)
    model.generator.feed(ids)
    # The cache holds keys and values of another batching of the same products: near-ties aside the tokens are the same.
    assert on_cache.tokens[0] == model.answer(messages, config).tokens[0]
    assert len(model.generator.cached) > len(ids)


def test_losses_do_not_depend_on_the_slices(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    task, tokenizer = get_task("text-generation"), model.generator.tokenizer
    rows = [{"prompt": "Say it.", "completion": "The kitchen light is off now."}, {"prompt": "And?", "completion": "Yes."}]
    examples = [task.encode(row, tokenizer, []) for row in rows]
    predictor = OnnxPredictor(model)
    whole = predictor.losses(examples)
    monkeypatch.setattr(decoder_module, "SCORED_FLOATS", 3 * 49152)
    sliced = predictor.losses(examples)
    assert [count for _, count in whole] == [int(example.arrays["supervised"].sum()) for example in examples]
    np.testing.assert_allclose([loss for loss, _ in sliced], [loss for loss, _ in whole], rtol=1e-3)
    assert all(0.5 < loss / count < 10 for loss, count in whole)
