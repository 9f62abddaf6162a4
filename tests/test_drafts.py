"""Drafts: what followed before is proposed, the answer stays what it is, and drafts that do not come true rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import edgelora
from edgelora.run import drafts as drafts_module
from edgelora.run.drafts import Drafts
from edgelora.run.generate import Answer
from edgelora.run.model import Model

PROMPTS = ("abc abc abc", "the cat sat on the mat, the cat sat on the", "0101010101", "x")


@pytest.fixture(scope="module")
def model(decoder_bundle: Path) -> Model:
    return edgelora.load(decoder_bundle, threads=1)


def answer(model: Model, prompt: str, **settings: Any) -> Answer:
    model.generator.forget()
    return model.answer(prompt, raw=True, **{"max_new_tokens": 100, **settings})


def test_what_followed_the_same_tokens_last_time_is_proposed() -> None:
    drafts = Drafts([1, 2, 3, 4, 5, 6, 7, 1, 2])
    assert drafts.propose(10) == [3, 4, 5, 6]
    assert drafts.propose(2) == [3, 4]
    assert drafts.propose(0) == []
    drafts.extend([9, 1, 2])
    assert drafts.propose(1) == [9], "the newest place counts"
    drafts.extend([3])
    assert drafts.propose(2) == [4, 5], "a longer n-gram counts more than a newer one"
    assert Drafts([1, 2, 3]).propose(5) == []
    assert Drafts([]).propose(5) == []


def test_drafts_grow_while_they_come_true_and_rest_while_they_do_not() -> None:
    drafts = Drafts([*range(20), 0, 1])
    drafts.learn(4, 4)
    assert len(drafts.propose(99)) == drafts_module.MOST
    drafts.learn(8, 1)
    assert len(drafts.propose(99)) == 2
    for times in (1, 2):
        while not drafts.rest:
            drafts.learn(2, 0)
        assert drafts.rest == times * drafts_module.REST, "they rest longer each time"
        assert [drafts.propose(99) for _ in range(drafts.rest)] == [[]] * times * drafts_module.REST
        assert drafts.propose(99)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "seed": 3}, {"repetition_penalty": 1.3}], ids=["greedy", "sampled", "penalty"]
)
def test_the_answer_is_the_same(model: Model, prompt: str, settings: dict[str, Any]) -> None:
    plain = answer(model, prompt, **settings)
    drafted = answer(model, prompt, speculate=True, **settings)
    assert drafted.tokens == plain.tokens
    assert (drafted.text, drafted.finish) == (plain.text, plain.finish)


def test_drafts_save_passes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    run = model.generator.decoder._run
    monkeypatch.setattr(model.generator.decoder, "_run", lambda ids, kept: passes.append(len(ids)) or run(ids, kept))
    drafted = answer(model, PROMPTS[0], speculate=True)
    assert drafted.drafts is not None
    assert drafted.drafts.accepted > 20, "a random model soon repeats itself"
    assert len(passes) < len(drafted.tokens) - 20


@pytest.mark.parametrize("most", [1, 2, 3, 7, 50])
def test_the_limit_holds(model: Model, most: int) -> None:
    drafted = answer(model, PROMPTS[0], speculate=True, max_new_tokens=most)
    assert (len(drafted.tokens), drafted.finish) == (most, "length")
    assert drafted.tokens == answer(model, PROMPTS[0], max_new_tokens=most).tokens


def test_drafts_never_leave_the_context(model: Model) -> None:
    prompt = "ab" * ((model.bundle.max_length - 20) // 2)
    drafted = answer(model, prompt, speculate=True)
    assert drafted.finish == "context"
    assert drafted.tokens == answer(model, prompt).tokens


def test_two_answers_at_a_time_are_what_each_is_alone(model: Model) -> None:
    alone = [answer(model, prompt, speculate=True).tokens for prompt in PROMPTS[:2]]
    both = [model.start(prompt, raw=True, max_new_tokens=100, speculate=True) for prompt in PROMPTS[:2]]
    for _ in range(100):
        for one in both:
            next(iter(one), None)
    assert [one.tokens for one in both] == alone


def test_the_next_prompt_finds_its_beginning_in_the_cache(model: Model) -> None:
    first = answer(model, PROMPTS[0], speculate=True)
    assert model.generator.cached[: len(first.prompt)] == first.prompt
    assert len(model.generator.cached) == model.generator.decoder.length
