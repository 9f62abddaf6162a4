"""Metrics of generated text against references."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgelora.tokenizer import Tokenizer


def perplexity(loss: float) -> float:
    """Return exp(loss); infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def score_texts(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the shares of outputs that equal their reference, contain it, and equal it as JSON; outer space does not count.

    `json_equal` is over the rows whose reference is a JSON object or list, and absent when there is none.
    """
    pairs = [(output.strip(), reference.strip()) for output, reference in zip(outputs, references, strict=True)]
    metrics = {
        "exact_match": share([output == reference for output, reference in pairs]),
        "contains": share([reference in output for output, reference in pairs]),
    }
    parsed = [(parse(output), parse(reference)) for output, reference in pairs]
    structured = [same_json(output, reference) for output, reference in parsed if isinstance(reference, dict | list)]
    return metrics | ({"json_equal": share(structured)} if structured else {})


def same_json(left: Any, right: Any) -> bool:
    """Compare JSON values: numbers by value (1 is 1.0), but true is not 1, as it is in Python."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def parse(text: str) -> Any:
    """Return the JSON value of a text, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def last_run(supervised: NDArray[np.uint8]) -> int:
    """Return where the last run of supervised tokens begins."""
    ends = np.flatnonzero(np.diff(supervised, prepend=0) == 1)  # uint8: 0 - 1 is 255, so 1 is a rise only
    return int(ends[-1])


def marked(ids: NDArray[np.int32], supervised: NDArray[np.uint8], tokenizer: Tokenizer) -> str:
    """Return rich markup of the decoded tokens, each run of targets in ⟦ ⟧."""
    from rich.markup import escape

    cuts = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    parts = []
    for start, end in pairwise(cuts):
        text = escape(tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False))
        parts.append(f"[bold green]⟦{text}⟧[/bold green]" if supervised[start] else text)
    return "".join(parts)
