"""When what Whisper writes is said: the rules for its tokens of time, and the parts of a text between them.

A token of time stands before and after each part, 0.02 seconds from one token to the next, beginning with <|0.00|>. The rules
are those of OpenAI's whisper (decoding.py, ApplyTimestampRules), as in transformers' WhisperTimeStampLogitsProcessor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEP = 0.02  # seconds
FIRST_AT_MOST = 1.0  # seconds: what begins later was not heard at all


@dataclass(frozen=True)
class Part:
    """Tokens of a text, and the seconds from and to which they are said; an end of None was not written."""

    tokens: list[int]
    start: float
    end: float | None


@dataclass(frozen=True)
class Times:
    """first, last: the tokens of 0 seconds and of the window's end; none: <|notimestamps|>; end: the token that ends a text."""

    first: int
    last: int
    none: int
    end: int

    def limit(self, scores: NDArray[np.float32], written: Sequence[Sequence[int]]) -> None:
        """Take from scores `[n, vocabulary]` what may not come after what is written of each text: times come in pairs, later
        ones later, and one comes where times together are likelier than any other token."""
        scores[:, [self.none, *range(self.last + 1, scores.shape[1])]] = -np.inf
        for row, tokens in zip(scores, written, strict=True):
            times = [token for token in tokens if token >= self.first]
            just, before = [token >= self.first for token in (*[self.first, self.first], *tokens)][:-3:-1]
            if not tokens:
                row[: self.first] = -np.inf
                row[self.first + round(FIRST_AT_MOST / STEP) + 1 :] = -np.inf
                continue
            if just and before:
                row[self.first :] = -np.inf
            elif just:
                row[: self.end] = -np.inf
            if times:  # a part may begin where the one before ended, but takes time
                row[self.first : times[-1] + (not (just and not before))] = -np.inf
            if self.likely(row):
                row[: self.first] = -np.inf

    def likely(self, row: NDArray[np.float32]) -> bool:
        """Tell whether times together are likelier than any other token."""
        times, others = row[self.first :], row[: self.first]
        most = times.max()
        return bool(most > -np.inf and most + np.log(np.exp(times - most).sum()) > others.max())

    def parts(self, tokens: Sequence[int]) -> list[Part]:
        """Return the parts of a text between its times."""
        found: list[Part] = []
        start, held = 0.0, []
        for token in tokens:
            if token < self.first:
                held.append(token)
                continue
            now = round((token - self.first) * STEP, 2)
            if held:
                found.append(Part(held, start, now))
            start, held = now, []
        return [*found, Part(held, start, None)] if held else found
