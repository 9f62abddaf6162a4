"""Answers that are a part of their context: what rows say, the best of several windows, and SQuAD's own scores.

Scores are those of the official scripts (Rajpurkar et al., 1606.05250 and, with questions that have no answer, 1806.03822):
lower case, without punctuation and articles; F1 of the words; a question without an answer wants the empty one.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import Metrics, Row
from edgelora.tasks.rows import kind

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)
LONGEST = 30  # tokens of an answer
BEST = 20  # starts and ends that are combined


@dataclass(frozen=True)
class Found:
    """An answer's characters in its context (None: there is none), its score, and its probability in its window."""

    place: tuple[int, int] | None
    score: float
    probability: float


def answers_of(row: Row) -> list[tuple[int, str]]:
    """Return (start, text) of each answer of a row without problems; [] where the question has none."""
    return [read_answer(answer, row["context"]) for answer in listed(row)]


def listed(row: Row) -> list[Any]:
    """Return the answers of a row, which the hub's data sets have as two lists. Raises ValueError that says what is wrong."""
    given = row.get("answers")
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        starts = given.get("answer_start")
        if not isinstance(starts, list) or len(starts) != len(given["text"]):
            raise ValueError('"answers" has not as many entries in "answer_start" as in "text"')
        return [{"text": text, "answer_start": start} for text, start in zip(given["text"], starts, strict=True)]
    if not isinstance(given, list):
        raise ValueError(f'"answers" is a {kind(given)}; a list of {{"text", "answer_start"}} is wanted')
    return given


def read_answer(answer: Any, context: str) -> tuple[int, str]:
    """Return where an answer begins, and its text. Raises ValueError that says what is wrong."""
    text = answer.get("text") if isinstance(answer, dict) else answer
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'is a {kind(answer)} without text; {{"text", "answer_start"}} is wanted')
    start = answer.get("answer_start", answer.get("start")) if isinstance(answer, dict) else None
    if start is None:
        start = context.find(text)
        if start < 0:
            raise ValueError(f'"{text}" is not in the context')
    elif not isinstance(start, int) or isinstance(start, bool):
        raise ValueError(f'has a {kind(start)} as "answer_start"; the number of a character is wanted')
    elif start < 0 or context[start : start + len(text)] != text:
        raise ValueError(f'"{text}" is not at {start} of the context, where it has "{context[max(0, start) :][: len(text)]}"')
    return start, text


def answer_problems(row: Row) -> list[str]:
    """Return what is wrong with the answers of a row that has a context."""
    try:
        given = listed(row)
    except ValueError as error:
        return [str(error)]
    problems = []
    for number, answer in enumerate(given, 1):
        try:
            read_answer(answer, row["context"])
        except ValueError as error:
            problems.append(f"answer {number} {error}")
    return problems


def best_span(starts: NDArray[np.float64], ends: NDArray[np.float64], places: NDArray[Any]) -> tuple[Found, Found]:
    """Return the best answer in a window, and that there is none. starts, ends: log probabilities [T]; places [T, 2]."""
    nothing = float(starts[0] + ends[0])
    best: Found = Found(None, -np.inf, 0.0)
    outside = places[:, 0] < 0
    firsts = np.argsort(-np.where(outside, -np.inf, starts), kind="stable")[:BEST]
    lasts = np.argsort(-np.where(outside, -np.inf, ends), kind="stable")[:BEST]
    for first in firsts[~outside[firsts]]:
        for last in lasts[~outside[lasts]]:
            score = float(starts[first] + ends[last])
            if first <= last < first + LONGEST and score > best.score:
                best = Found((int(places[first, 0]), int(places[last, 1])), score, float(np.exp(score)))
    return best, Found(None, nothing, float(np.exp(nothing)))


def choose(windows: Sequence[tuple[Found, Found]]) -> Found:
    """Return the answer of several windows: none if each of them finds it likelier that there is none than the best answer."""
    best = max((found for found, _ in windows), key=lambda found: found.score)
    nothing = min((found for _, found in windows), key=lambda found: found.score)
    return best if best.score > nothing.score else nothing


def normalized(text: str) -> str:
    kept = "".join(character for character in text.lower() if character not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", kept).split())


def word_f1(found: str, wanted: str) -> float:
    ours, theirs = normalized(found).split(), normalized(wanted).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 0.0 if not common else 2 * common / (len(ours) + len(theirs))


def answer_scores(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> Metrics:
    """Return exact_match and f1, and both for the questions with an answer where some have none."""
    golds = [[text for text in texts if normalized(text)] or [""] for texts in wanted]
    exact = [max(float(normalized(one) == normalized(text)) for text in texts) for one, texts in zip(found, golds, strict=True)]
    f1 = [max(word_f1(one, text) for text in texts) for one, texts in zip(found, golds, strict=True)]
    metrics = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}
    answered = np.array([texts != [""] for texts in golds])
    if answered.any() and not answered.all():
        metrics |= {"has_answer_f1": float(np.mean(np.array(f1)[answered]))}
        metrics |= {"no_answer_accuracy": float(np.mean(np.array(exact)[~answered]))}
    return metrics
