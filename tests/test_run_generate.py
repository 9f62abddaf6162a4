"""Text from tokens: stop strings, characters of several tokens, limits, prompts as trained, the cache between answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgelora
from edgelora.config import GenerateConfig
from edgelora.errors import UserError
from edgelora.run.generate import Answer, prompt_ids
from edgelora.run.model import Model
from edgelora.run.stops import StopStrings
from edgelora.tasks import get_task

END = 256  # <|end|> of the tiny tokenizer


class Script:
    """In the place of a decoder: writes the given tokens, whatever it is asked."""

    def __init__(self, tokens: Sequence[int], max_length: int = 1000) -> None:
        self.tokens, self.max_length, self.length, self.written = [*tokens, END], max_length, 0, 0
        self.bound = self  # ONNX Runtime's: nothing is drafted by default

    def reserve(self, positions: int) -> None:
        assert positions <= self.max_length

    def rewind(self, length: int) -> None:
        self.length, self.written = length, 0

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.length += len(ids)
        logits = np.zeros(288, np.float32)
        logits[self.tokens[self.written]] = 1
        self.written += 1
        return logits

    def step(self, token: int) -> NDArray[np.float32]:
        return self.prefill([token])


@pytest.fixture
def model(decoder_bundle: Path) -> Model:
    return edgelora.load(decoder_bundle, threads=1)


def scripted(model: Model, text: str, **settings: Any) -> tuple[list[str], Answer]:
    """Return the pieces and the answer when the model writes `text`, byte by byte."""
    generator = model.generator
    generator.decoder = Script(generator.tokenizer.encode(text, add_special_tokens=False))  # type: ignore[assignment]
    answer = model.start("x", **settings)
    return list(answer), answer


def test_characters_of_several_tokens_come_whole(model: Model) -> None:
    text = "naïve 😀 日本 é"
    pieces, answer = scripted(model, text)
    assert "".join(pieces) == answer.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "😀" in pieces
    assert answer.finish == "end"
    assert len(answer.tokens) == len(text.encode())


def test_a_stop_string_across_tokens_ends_the_answer_and_is_not_shown(model: Model) -> None:
    pieces, answer = scripted(model, "one STone STOP two", stop=["STOP"])
    assert "".join(pieces) == answer.text == "one STone "
    assert answer.finish == "stop"
    assert not any(piece.endswith("S") for piece in pieces), "what may begin a stop string is held back"


def test_what_was_held_back_comes_at_the_end(model: Model) -> None:
    pieces, answer = scripted(model, "one STO", stop=["STOP"])
    assert "".join(pieces) == "one STO"
    assert answer.finish == "end"


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "found"),
    [
        (["abc"], (), "abc", False),
        (["ab", "c", "d"], ("bc",), "a", True),
        (["aab"], ("ab",), "a", True),
        (["a", "a", "b"], ("aab",), "", True),
        (["x", "aa", "ab"], ("aab",), "xa", True),
        (["xyz"], ("z", "y"), "x", True),
        (["ab"], ("abc",), "ab", False),
        (["日", "本", "終"], ("本終",), "日", True),
    ],
)
def test_stop_strings(pieces: list[str], stops: tuple[str, ...], shown: str, found: bool) -> None:
    held = StopStrings(stops)
    text = ""
    for piece in pieces:
        text += held.push(piece)
        if held.found:
            break
    assert (text + held.rest(), held.found) == (shown, found)


def test_max_new_tokens_cuts(model: Model) -> None:
    _, answer = scripted(model, "abcdef", max_new_tokens=3)
    assert (answer.text, answer.finish) == ("abc", "length")


def test_the_limit_of_the_bundle_cuts(model: Model) -> None:
    prompt = "a" * 1019  # 1021 tokens with the template's
    answer = model.answer([{"role": "user", "content": prompt}], max_new_tokens=50)
    assert len(answer.prompt) == 1022
    assert answer.finish == "context" or len(answer.tokens) < 3
    assert len(answer.prompt) + len(answer.tokens) <= 1025, "the last token needs no place in the cache"


def test_a_prompt_over_the_limit_is_refused_before_anything_runs(model: Model) -> None:
    model.generate("hello", max_new_tokens=1)
    cached = list(model.generator.cached)
    with pytest.raises(UserError, match="the text has 2003 tokens; this bundle takes at most 1024"):
        model.generate("a" * 2000)
    assert model.generator.cached == cached


def test_an_empty_prompt_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        model.generate("", raw=True)


def test_the_prompt_is_the_one_of_training(model: Model) -> None:
    tokenizer, task = model.generator.tokenizer, get_task("text-generation")
    example = task.encode({"prompt": "turn it off", "completion": "done"}, tokenizer, [])
    ids = prompt_ids(tokenizer, "turn it off", GenerateConfig())
    assert example.arrays["ids"][: len(ids)].tolist() == ids
    assert example.arrays["supervised"].tolist()[: len(ids) + 1] == [0] * len(ids) + [1]


def test_system_and_raw(model: Model) -> None:
    tokenizer = model.generator.tokenizer

    def text(prompt: Any, **settings: Any) -> str:
        return tokenizer.decode(prompt_ids(tokenizer, prompt, GenerateConfig(**settings)), skip_special_tokens=False)

    assert text("hi") == "<|user|>hi<|end|><|assistant|>"
    assert text("hi", system="be kind") == "<|system|>be kind<|end|><|user|>hi<|end|><|assistant|>"
    assert text("hi", raw=True) == "hi"
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    assert text(own, system="be kind") == "<|system|>mine<|end|><|user|>hi<|end|><|assistant|>"


def test_the_cache_is_kept_where_prompts_begin_alike(model: Model) -> None:
    fresh = model.generate("a long beginning, then this", max_new_tokens=8)
    model.generator.forget()
    model.generate("a long beginning, then that", max_new_tokens=8)
    ran = []
    prefill = model.generator.decoder.prefill
    model.generator.decoder.prefill = lambda ids: (ran.append(len(ids)), prefill(ids))[1]  # type: ignore[method-assign]
    assert model.generate("a long beginning, then this", max_new_tokens=8) == fresh
    assert ran[0] < 10


def test_two_answers_at_once_are_each_their_own(model: Model) -> None:
    alone = [model.generate(text, max_new_tokens=12) for text in ("first", "second")]
    answers = [model.start(text, max_new_tokens=12) for text in ("first", "second")]
    turns = [iter(answer) for answer in answers]
    for _ in range(20):
        for turn in turns:
            next(turn, None)
    assert [answer.text for answer in answers] == alone


def test_sampling_is_repeatable_by_seed(model: Model) -> None:
    settings = {"temperature": 1.5, "max_new_tokens": 20}
    assert model.generate("x", seed=3, **settings) == model.generate("x", seed=3, **settings)
    assert model.generate("x", seed=3, **settings) != model.generate("x", seed=4, **settings)


def test_greedy_is_that_of_transformers(model: Model, decoder_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(decoder_model, dtype=torch.float32).eval()
    for prompt in ("hello", "turn it off", "x"):
        answer = model.answer(prompt, max_new_tokens=20)
        ids = torch.tensor([answer.prompt])
        with torch.no_grad():
            wanted = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=END, pad_token_id=260
            )
        assert answer.tokens == [token for token in wanted[0, len(answer.prompt) :].tolist() if token != END]
