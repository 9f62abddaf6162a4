"""Which tokens a decoder writes: greedy, or by beams. numpy only; torch models and ONNX graphs are searched by this one code.

Equal to transformers' generate for the same settings. Beam search: of the 2·beams best continuations, those that end go to the
finished ones with score log p / length^penalty, the best of the others go on (Wu et al., arXiv 1609.08144, section 7, with the
length alone as the penalty).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelora.times import Times

Scores = NDArray[np.float32]
NEVER = np.float32(-1e9)  # the score of what is not there, as transformers has it: below every sum of log probabilities
DEFAULT_TOKENS = 256


class Steps(Protocol):
    """A decoder over encoded inputs, one row of its cache for each."""

    def start(self, prompt: Sequence[int]) -> Scores:
        """Feed the same tokens to every row; return the logits `[rows, vocabulary]` after the last."""
        ...

    def step(self, tokens: NDArray[np.int64], rows: NDArray[np.int64]) -> Scores:
        """Let row i go on from what was row `rows[i]`, with `tokens[i]`; return the logits `[len(rows), vocabulary]`."""
        ...


@dataclass(frozen=True)
class Search:
    """Settings, in the names of generation_config.json where it has them. `prompt`: the tokens that a decoder begins with."""

    prompt: tuple[int, ...]
    eos: tuple[int, ...]
    max_new_tokens: int = DEFAULT_TOKENS
    min_length: int = 0  # of prompt and answer together
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # or "never"
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    forced_bos: int | None = None
    forced_eos: int | None = None
    banned: tuple[int, ...] = ()
    banned_first: tuple[int, ...] = ()
    times: Times | None = None  # where tokens of time are wanted

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], prompt: Sequence[int], eos: Sequence[int]) -> Search:
        """Read generation_config.json (and config.json, where older models keep the same keys)."""
        found: dict[str, Any] = {}
        plain = ("num_beams", "length_penalty", "early_stopping", "no_repeat_ngram_size", "min_length", "repetition_penalty")
        for name in plain:
            if settings.get(name) is not None:
                found[name] = settings[name]
        longest = settings.get("max_new_tokens") or (settings.get("max_length") or 0) - len(prompt)
        if longest > 0:
            found["max_new_tokens"] = int(longest)
        words = [words[0] for words in settings.get("bad_words_ids") or [] if len(words) == 1]
        return cls(
            prompt=tuple(prompt),
            eos=tuple(eos),
            forced_bos=settings.get("forced_bos_token_id"),
            forced_eos=first_of(settings.get("forced_eos_token_id")),
            banned=(*words, *(settings.get("suppress_tokens") or [])),
            banned_first=tuple(settings.get("begin_suppress_tokens") or []),
            **found,
        )

    def limited(self, max_new_tokens: int) -> Search:
        """Return the search with at most so many tokens."""
        return dataclasses.replace(self, max_new_tokens=max(1, min(self.max_new_tokens, max_new_tokens)))

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt) + self.max_new_tokens

    def filtered(self, scores: Scores, sequences: Sequence[Sequence[int]]) -> Scores:
        """Return scores `[n, vocabulary]` of what may come after sequences (prompts and what is written so far)."""
        scores = scores.copy()
        length, started = len(sequences[0]), len(self.prompt)
        for row, sequence in enumerate(sequences):
            if self.repetition_penalty != 1.0:
                seen = np.array(sorted(set(sequence)))
                found = scores[row, seen]
                penalty = np.float32(self.repetition_penalty)
                scores[row, seen] = np.where(found < 0, found * penalty, found / penalty)
            if self.no_repeat_ngram_size:
                scores[row, repeating(sequence, self.no_repeat_ngram_size)] = -np.inf
        if length < self.min_length:
            scores[:, list(self.eos)] = -np.inf
        if self.forced_bos is not None and length == 1:
            scores = only(scores, self.forced_bos)
        if self.forced_eos is not None and length == self.max_length - 1:
            scores = only(scores, self.forced_eos)
        scores[:, list(self.banned)] = -np.inf
        if length == started:
            scores[:, list(self.banned_first)] = -np.inf
        if self.times is not None:
            self.times.limit(scores, [sequence[started:] for sequence in sequences])
        return scores


def search(steps: Steps, count: int, settings: Search) -> list[list[int]]:
    """Return what is written for each of `count` rows, without the token that ends it."""
    written = greedy(steps, count, settings) if settings.num_beams == 1 else beams(steps, count, settings)
    return [[token for token in tokens if token not in settings.eos] for tokens in written]


def greedy(steps: Steps, count: int, settings: Search) -> list[list[int]]:
    """Take the likeliest token each time."""
    written: list[list[int]] = [[] for _ in range(count)]
    rows, open_rows = np.arange(count), list(range(count))
    logits = steps.start(settings.prompt)
    while True:
        scores = settings.filtered(logits, [[*settings.prompt, *written[row]] for row in open_rows])
        tokens = scores.argmax(-1)
        for row, token in zip(open_rows, tokens.tolist(), strict=True):
            written[row].append(token)
        full = len(written[open_rows[0]]) >= settings.max_new_tokens
        rows = np.array([place for place, token in enumerate(tokens.tolist()) if token not in settings.eos and not full], int)
        if not len(rows):
            return written
        open_rows = [open_rows[row] for row in rows]
        logits = steps.step(tokens[rows], rows)


def beams(steps: Steps, count: int, settings: Search) -> list[list[int]]:
    """Search each row with `num_beams` beams; rows that are done leave the batch."""
    found = [Beams(settings) for _ in range(count)]
    width = settings.num_beams
    logits = np.repeat(steps.start(settings.prompt), width, axis=0)
    places = {number: number for number in range(count)}  # of each open search, its place among the rows of the last step
    size = 1  # rows of a search in the cache: after the prompt all beams are still one
    while True:
        open_searches = list(places)
        sequences = [sequence for number in open_searches for sequence in found[number].sequences]
        scores = settings.filtered(log_softmax(logits), sequences)
        for place, number in enumerate(open_searches):
            found[number].advance(scores[place * width : (place + 1) * width])
        going_on = [(place, number) for place, number in enumerate(open_searches) if not found[number].done]
        if not going_on:
            return [search.best[len(settings.prompt) :] for search in found]
        parents = [size * place + (found[n].parents if size > 1 else np.zeros(width, int)) for place, n in going_on]
        tokens = np.array([sequence[-1] for _, number in going_on for sequence in found[number].sequences])
        logits = steps.step(tokens, np.concatenate(parents))
        places, size = {number: place for place, (_, number) in enumerate(going_on)}, width


@dataclass
class Beams:
    """The beams of one input. `parents`: of the beams that go on, which of the beams before they come from."""

    settings: Search
    sequences: list[list[int]] = field(init=False)
    scores: Scores = field(init=False)
    finished: list[list[int]] = field(init=False)
    finished_scores: Scores = field(init=False)
    is_finished: NDArray[np.bool_] = field(init=False)
    parents: NDArray[np.int64] = field(init=False)
    improvable: bool = True
    done: bool = False

    def __post_init__(self) -> None:
        width = self.settings.num_beams
        self.sequences = [list(self.settings.prompt) for _ in range(width)]
        self.finished = [list(self.settings.prompt) for _ in range(width)]
        self.scores = np.full(width, NEVER)
        self.scores[0] = 0.0  # all beams are the same at first: only one counts
        self.finished_scores = np.full(width, NEVER)
        self.is_finished = np.zeros(width, bool)
        self.parents = np.arange(width)

    @property
    def best(self) -> list[int]:
        return self.finished[0]

    def advance(self, log_probabilities: Scores) -> None:
        """Take the next tokens by their filtered log probabilities `[beams, vocabulary]`."""
        settings, width = self.settings, self.settings.num_beams
        flat: Scores = (log_probabilities + self.scores[:, None]).ravel()
        chosen = largest(flat, max(2, 1 + len(settings.eos)) * width)
        scores, parents, tokens = flat[chosen], chosen // log_probabilities.shape[1], chosen % log_probabilities.shape[1]
        length = len(self.sequences[0]) + 1
        ends = np.isin(tokens, settings.eos) | (length >= settings.max_length)
        candidates = [[*self.sequences[parent], int(token)] for parent, token in zip(parents, tokens, strict=True)]
        running = np.asarray(scores + ends * NEVER, np.float32)
        order = largest(running, width)
        self._finish(candidates, scores, ends & (np.arange(len(ends)) < width), length)
        self.sequences, self.scores, self.parents = [candidates[i] for i in order], running[order], parents[order]
        self._judge(length)
        self.done = not self.improvable or bool(ends.all())
        self.done |= settings.early_stopping is True and bool(self.is_finished.all())

    def _finish(self, candidates: list[list[int]], scores: Scores, just: NDArray[np.bool_], length: int) -> None:
        """Keep the best of what was finished before and of what is finished just now."""
        settings = self.settings
        worth = scores / np.float32((length - len(settings.prompt)) ** settings.length_penalty)
        closed = (settings.early_stopping is True and bool(self.is_finished.all())) or not self.improvable
        worth = (worth + (NEVER if closed else np.float32(0)) + ~just * NEVER).astype(np.float32)
        merged = np.concatenate([self.finished_scores, worth])
        order = largest(merged, settings.num_beams)
        sequences, flags = [*self.finished, *candidates], np.concatenate([self.is_finished, just])
        self.finished, self.finished_scores, self.is_finished = [sequences[i] for i in order], merged[order], flags[order]

    def _judge(self, length: int) -> None:
        """Tell whether what goes on can still become better than the worst that is finished."""
        settings = self.settings
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        tokens = settings.max_new_tokens if longest else length - len(settings.prompt)
        possible = self.scores[0] / np.float32(tokens**settings.length_penalty)
        worst = np.where(self.is_finished, self.finished_scores.min(), NEVER)
        self.improvable = self.improvable and bool((possible > worst).any())


def largest(values: Scores, count: int) -> NDArray[np.int64]:
    """Return the places of the `count` largest values, the largest first."""
    count = min(count, len(values))
    found = np.argpartition(-values, count - 1)[:count]
    return found[np.lexsort((found, -values[found]))]


def repeating(sequence: Sequence[int], size: int) -> list[int]:
    """Return the tokens that would make an n-gram of that size occur twice."""
    if len(sequence) + 1 < size:
        return []
    last = tuple(sequence[len(sequence) - size + 1 :])
    places = range(len(sequence) - size + 1)
    return [sequence[i + size - 1] for i in places if tuple(sequence[i : i + size - 1]) == last]


def only(scores: Scores, token: int) -> Scores:
    """Return scores that allow one token."""
    forced = np.full_like(scores, -np.inf)
    forced[:, token] = 0.0
    return forced


def log_softmax(logits: Scores) -> Scores:
    """Return log probabilities over the last axis, fp32."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), dtype=np.float32)


def first_of(value: Any) -> int | None:
    found = value[0] if isinstance(value, list) else value
    return None if found is None else int(found)
