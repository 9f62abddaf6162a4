"""Each way of choosing a token against transformers' LogitsProcessor of the same name, and the draw itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import generation

from edgelora.config import GenerateConfig
from edgelora.errors import SettingsError
from edgelora.run.model import merge
from edgelora.run.sampling import Sampler, draw, keep_min_p, keep_top_k, keep_top_p, penalize

VOCABULARY = 3000


def some_logits(seed: int, *, ties: bool = False) -> NDArray[np.float32]:
    logits = np.random.default_rng(seed).normal(0, 3, VOCABULARY).astype(np.float32)
    return logits.round(0) if ties else logits


def kept_by(processor: Any, logits: NDArray[np.float32]) -> set[int]:
    scores = processor(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits)[None].clone())
    return set(torch.isfinite(scores[0]).nonzero().flatten().tolist())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 5, 50, VOCABULARY, 2 * VOCABULARY])
def test_top_k_keeps_what_transformers_keeps(k: int, ties: bool) -> None:
    logits = some_logits(k, ties=ties)
    assert set(keep_top_k(logits, k).tolist()) == kept_by(generation.TopKLogitsWarper(k), logits)


@pytest.mark.parametrize("flat", [1.0, 0.01])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(p: float, flat: float) -> None:
    logits = some_logits(int(p * 1000)) * np.float32(flat)  # nearly flat: more tokens than the shortlist holds
    assert set(keep_top_p(logits, p).tolist()) == kept_by(generation.TopPLogitsWarper(p), logits)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.7, 1.0])
def test_min_p_keeps_what_transformers_keeps(p: float) -> None:
    logits = some_logits(int(p * 1000))
    assert set(keep_min_p(logits, p).tolist()) == kept_by(generation.MinPLogitsWarper(p), logits)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, seen = some_logits(7), [3, 9, 9, 100, 2999]
    before = logits.copy()
    processor = generation.RepetitionPenaltyLogitsProcessor(penalty)
    wanted = processor(torch.tensor([seen]), torch.from_numpy(logits)[None].clone())[0].numpy()
    np.testing.assert_array_equal(penalize(logits, seen, penalty), wanted)
    np.testing.assert_array_equal(logits, before)  # the session's buffer is not touched


def test_all_together_leave_what_the_chain_of_transformers_leaves() -> None:
    config = GenerateConfig(temperature=1.7, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.2)
    logits, seen = some_logits(11), list(range(0, 3000, 7))
    chain = generation.LogitsProcessorList(
        [
            generation.RepetitionPenaltyLogitsProcessor(1.2),
            generation.TemperatureLogitsWarper(1.7),
            generation.TopKLogitsWarper(40),
            generation.TopPLogitsWarper(0.8),
            generation.MinPLogitsWarper(0.05),
        ]
    )
    probabilities = chain(torch.tensor([seen]), torch.from_numpy(logits)[None].clone())[0].softmax(-1).numpy()
    sampler = Sampler(config)
    counts = np.bincount([sampler.choose(logits, seen) for _ in range(4000)], minlength=VOCABULARY) / 4000
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(probabilities))
    # Four standard deviations of a share of 4000 draws.
    assert np.all(np.abs(counts - probabilities) <= 4 * np.sqrt(probabilities / 4000) + 1e-9)


def test_draw_inverts_the_cumulative_distribution() -> None:
    scores = np.log(np.array([0.2, 0.5, 0.3], np.float32))
    assert [draw(scores, u) for u in (0.0, 0.19, 0.21, 0.69, 0.71, 0.999999)] == [0, 0, 1, 1, 2, 2]


def test_no_temperature_is_greedy_whatever_else_is_set() -> None:
    logits = some_logits(3)
    assert Sampler(GenerateConfig(top_k=5, top_p=0.1, seed=4)).choose(logits, ()) == int(logits.argmax())


def test_the_seed_decides() -> None:
    logits = some_logits(5)

    def tokens(seed: int) -> list[int]:
        sampler = Sampler(GenerateConfig(temperature=2.0, seed=seed))
        return [sampler.choose(logits, ()) for _ in range(20)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_a_very_low_temperature_is_finite() -> None:
    logits = some_logits(6)
    assert Sampler(GenerateConfig(temperature=1e-4)).choose(logits, ()) == int(logits.argmax())


def test_settings_out_of_range_are_listed_together() -> None:
    with pytest.raises(SettingsError) as caught:
        merge(None, {"temperature": -1.0, "top_p": 0.0, "top-pp": 1})
    assert caught.value.message.splitlines() == [
        "generation settings: 3 problems",
        '  "temperature" is -1.0; allowed: at least 0',
        '  "top_p" is 0.0; allowed: above 0 to 1',
        '  "top-pp" is not a setting. Did you mean "top_p"?',
    ]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(SettingsError, match='"stop" holds an empty string'):
        merge(None, {"stop": ["END", ""]})
