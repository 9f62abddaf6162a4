"""Tags of words: where spans and tokens meet, and what seqeval says of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import MachineError
from edgelora.tasks.base import Example, Metrics
from edgelora.tasks.classified import log_softmax
from edgelora.tasks.spans import Range, Span, spans_of_tags


def tags_of_spans(spans: Iterable[Span], words: Sequence[Range]) -> list[str]:
    """Return the tag of each word: B- for the first that a span has a part of, I- for the others."""
    tags = ["O"] * len(words)
    ends = [end for _, end in words]
    for start, end, label in spans:
        prefix = "B-"
        for number in range(bisect_right(ends, start), len(words)):
            if words[number][0] >= end:
                break
            tags[number] = prefix + label
            prefix = "I-"
    return tags


def first_tokens(
    text: str, words: Sequence[Range], offsets: Sequence[Range], sequences: Sequence[int | None]
) -> Iterator[tuple[int, int]]:
    """Yield (token, word) for each word that a token begins in: its first token."""
    ends, last = [end for _, end in words], -1
    for place, ((start, end), sequence) in enumerate(zip(offsets, sequences, strict=True)):
        piece = text[start:end]
        if sequence is None or not piece.strip():
            continue
        number = bisect_right(ends, start + len(piece) - len(piece.lstrip()))
        if number < len(words) and number > last:
            last = number
            yield place, number


def span_scores(truth: list[list[str]], found: list[list[str]]) -> Metrics:
    """Return seqeval's micro averages, the share of right tags, and the report per label. Raises MachineError without it."""
    try:
        from seqeval.metrics import classification_report
    except ImportError:
        raise MachineError("these metrics need seqeval", hint='pip install "edgelora[train]"') from None
    outside = all(tag == "O" for tags in [*truth, *found] for tag in tags)
    report = {} if outside else classification_report(truth, found, output_dict=True, zero_division=0)
    numbers = {name: {key: float(value) for key, value in row.items()} for name, row in report.items()}
    micro = numbers.get("micro avg", {"precision": 0.0, "recall": 0.0, "f1-score": 0.0})
    right = [one == other for a, b in zip(truth, found, strict=True) for one, other in zip(a, b, strict=True)]
    return {
        "micro_precision": micro["precision"],
        "micro_recall": micro["recall"],
        "f1": micro["f1-score"],
        "accuracy": sum(right) / len(right),
        "report": {name: row for name, row in numbers.items() if not name.endswith(" avg")},
    }


def word_scores(outputs: Sequence[Mapping[str, NDArray[Any]]], examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
    """Return loss (nats per word), and what seqeval says of the likeliest tags of the words."""
    truth, found, losses = [], [], []
    for example, said in zip(examples, outputs, strict=True):
        places = (example.arrays["tags"] >= 0).nonzero()[0]
        scores = log_softmax(said["logits"][places].astype(np.float64))
        tags = example.arrays["tags"][places]
        losses.append(-scores[np.arange(len(tags)), tags])
        truth.append([labels[number] for number in tags])
        found.append([labels[number] for number in scores.argmax(axis=1)])
    return {"loss": float(np.concatenate(losses).mean()), **span_scores(truth, found)}


def found_spans(logits: NDArray[Any], places: NDArray[np.int32], text: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return [{"label", "start", "end", "text", "probability"}] of logits [T, labels]; places [T, 2]: the characters of
    the word that begins at a token, or -1. The probability is the mean of the words'."""
    begins = (places[:, 0] >= 0).nonzero()[0]
    scores = log_softmax(logits[begins].astype(np.float64))
    words = [(int(start), int(end)) for start, end in places[begins]]
    best = np.exp(scores.max(axis=1))
    spans = []
    for start, end, label in spans_of_tags([labels[number] for number in scores.argmax(axis=1)], words):
        sure = best[[start <= word[0] < end for word in words]].mean()
        found = {"label": label, "start": start, "end": end, "text": text[start:end], "probability": float(sure)}
        spans.append(found)
    return spans
