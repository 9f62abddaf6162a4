"""Choosing the next token from logits. The order is that of transformers' generate: penalty, temperature, top-k, top-p, min-p.

Each filter takes the scores `[n]` of the tokens still in play and returns the indices into them that stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from edgelora.config import GenerateConfig

Scores = NDArray[np.float32]
Indices = NDArray[np.int64]

SHORTLIST = 1024  # likeliest tokens that top-p sorts first; nearly always they hold the mass


class Sampler:
    """Chooses tokens by the settings; its random numbers depend on the seed alone."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.random = np.random.default_rng(config.seed)
        self.filters: list[Callable[[Scores], Indices]] = []
        if config.top_k > 0:
            self.filters.append(lambda scores: keep_top_k(scores, config.top_k))
        if config.top_p < 1:
            self.filters.append(lambda scores: keep_top_p(scores, config.top_p))
        if config.min_p > 0:
            self.filters.append(lambda scores: keep_min_p(scores, config.min_p))

    def choose(self, logits: Scores, seen: Iterable[int]) -> int:
        """Return the next token for logits `[vocabulary]`; `seen` are the tokens of prompt and answer so far."""
        if self.config.repetition_penalty != 1:
            logits = penalize(logits, seen, self.config.repetition_penalty)
        if self.config.temperature == 0:
            return int(logits.argmax())
        scores, tokens = logits / np.float32(self.config.temperature), None
        for keep in self.filters:
            kept = keep(scores)
            scores, tokens = scores[kept], kept if tokens is None else tokens[kept]
        index = draw(scores, self.random.random())
        return index if tokens is None else int(tokens[index])


def penalize(logits: Scores, seen: Iterable[int], penalty: float) -> Scores:
    """Return a copy in which tokens that occurred are less likely: positive logits / penalty, negative ones × penalty.

    Source: CTRL (arXiv 1909.05858, section 4.1), with the sign rule that transformers added.
    """
    tokens = np.fromiter(set(seen), np.int64)
    result = logits.copy()
    scores = result[tokens]
    result[tokens] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return result


def keep_top_k(scores: Scores, k: int) -> Indices:
    """Keep the k largest scores, and those equal to the k-th (Fan et al., arXiv 1805.04833)."""
    if k >= len(scores):
        return np.arange(len(scores))
    return np.flatnonzero(scores >= np.partition(scores, -k)[-k])


def keep_top_p(scores: Scores, p: float) -> Indices:
    """Keep the smallest set of likeliest tokens whose probability reaches p (nucleus sampling, arXiv 1904.09751, eq. 2).

    A token stays when the tokens likelier than it sum to less than p.
    """
    probabilities = softmax(scores)
    shortlist = np.arange(len(scores))
    if len(scores) > SHORTLIST:
        largest = np.argpartition(probabilities, -SHORTLIST)[-SHORTLIST:]
        if probabilities[largest].sum() >= p:
            shortlist = largest
    order = shortlist[np.argsort(-probabilities[shortlist], kind="stable")]
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < p]
    return kept if len(kept) else order[:1]


def keep_min_p(scores: Scores, p: float) -> Indices:
    """Keep tokens whose probability is at least p times the largest (min-p, arXiv 2407.01082, eq. 1)."""
    return np.flatnonzero(scores >= scores.max() + math.log(p))


def draw(scores: Scores, uniform: float) -> int:
    """Return an index by its probability softmax(scores): the inverse of the cumulative distribution at `uniform` in [0, 1)."""
    cumulative = np.cumsum(softmax(scores))
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(index, len(scores) - 1)


def softmax(scores: Scores) -> NDArray[np.float64]:
    """Return probabilities in float64: sums over a vocabulary lose digits in float32."""
    exponentials = np.exp(scores.astype(np.float64) - float(scores.max()))
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum()
    return probabilities
