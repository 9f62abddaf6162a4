"""Searching for what a decoder writes, on decoders of a few tokens whose probabilities are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edgelora.search import Search, largest, repeating, search

EOS = 0


class Chain:
    """A decoder whose next token depends on the last one alone: rows of `table` are its probabilities."""

    def __init__(self, table: list[list[float]], count: int = 1) -> None:
        self.logits = np.log(np.array(table, np.float32))
        self.count = count
        self.steps = 0

    def start(self, prompt: Sequence[int]) -> Any:
        return np.repeat(self.logits[prompt[-1]][None], self.count, 0)

    def step(self, tokens: Any, rows: Any) -> Any:
        self.steps += 1
        return self.logits[tokens]


# After 1 the likeliest token is 2, after which nothing is likely; 3 is less likely at first, and ends for sure.
GARDEN = [[1e-9, 1, 1e-9, 1e-9], [1e-9, 1e-9, 0.6, 0.4], [0.3, 0.35, 1e-9, 0.35], [1 - 3e-9, 1e-9, 1e-9, 1e-9]]


def test_beams_find_what_greedy_passes_by() -> None:
    greedy = Search(prompt=(1,), eos=(EOS,), max_new_tokens=2)
    assert search(Chain(GARDEN), 1, greedy) == [[2, 1]]
    assert search(Chain(GARDEN), 1, Search(prompt=(1,), eos=(EOS,), max_new_tokens=2, num_beams=2)) == [[3]]


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_that_end_leave_the_batch(beams: int) -> None:
    chain = Chain(GARDEN, count=3)
    found = search(chain, 3, Search(prompt=(3,), eos=(EOS,), max_new_tokens=50, num_beams=beams, early_stopping=True))
    assert found == [[], [], []]
    assert chain.steps < 20


def test_what_may_not_come_does_not() -> None:
    scores = np.zeros((1, 4), np.float32)
    allowed = lambda found: np.flatnonzero(found[0] > -np.inf).tolist()  # noqa: E731  # one word for one line
    search_1 = Search(prompt=(1,), eos=(EOS,), max_new_tokens=4, forced_bos=2, forced_eos=EOS, banned_first=(3,))
    assert allowed(search_1.filtered(scores, [[1]])) == [2]
    assert allowed(search_1.filtered(scores, [[1, 2, 2, 2]])) == [EOS]
    assert allowed(search_1.filtered(scores, [[1, 2]])) == [0, 1, 2, 3]
    search_2 = Search(prompt=(1,), eos=(EOS,), min_length=3, banned=(2,), banned_first=(3,), no_repeat_ngram_size=2)
    assert allowed(search_2.filtered(scores, [[1]])) == [1]
    assert allowed(search_2.filtered(scores, [[1, 3, 1]])) == [0, 1]
    assert repeating([5, 6, 5], 2) == [6]
    assert repeating([5, 6, 5, 6], 3) == [5]


def test_settings_are_read_as_models_keep_them() -> None:
    settings = {"num_beams": 4, "max_length": 20, "forced_eos_token_id": [2], "bad_words_ids": [[7], [8, 9]],
                "suppress_tokens": [5], "early_stopping": None}  # fmt: skip
    found = Search.from_settings(settings, [1, 3], [2])
    assert (found.num_beams, found.max_new_tokens, found.max_length, found.forced_eos) == (4, 18, 20, 2)
    assert (found.banned, found.early_stopping) == ((7, 5), False)
    assert found.limited(5).max_new_tokens == 5 < found.limited(99).max_new_tokens == 18


def test_the_largest_come_first() -> None:
    assert largest(np.array([1, 5, 3, 5], np.float32), 3).tolist() == [1, 3, 2]
