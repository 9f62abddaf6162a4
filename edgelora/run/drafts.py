"""Drafts without a second model: what followed the last tokens where they stood before, in the prompt or in the answer.

The model checks a draft in one pass, which reads its weights once for all of it; tokens that it would not have written itself
are forgotten. A pass over several tokens takes longer than a step, and most texts do not repeat themselves: drafts grow while
they come true, shrink and rest while they do not. That depends on the text alone, never on the clock, so that an answer can be
had again.
Sources: prompt lookup decoding (Saxena 2023); LLMA (Yang et al., arXiv 2304.04487); the check: arXiv 2211.17192.
"""

from __future__ import annotations

from collections.abc import Iterable

SIZES = (4, 3, 2)  # n-grams that are looked up, the longest first
FIRST, MOST = 4, 8  # tokens of a draft: at the start, and where all of them come true
COST = 0.2  # steps that a token more in a pass costs, measured: a pass over 5 takes 1.7 steps, over 9 takes 2.6
LOSS = 1.0  # steps lost, on balance, before drafts rest
REST, LONGEST_REST = 16, 256  # steps without drafts after that; doubled each time


class Drafts:
    """Proposes tokens for one text and learns whether that pays."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}  # n-gram → where the token stands that followed it last
        self.size = FIRST  # tokens of the next draft
        self.balance = 0.0  # steps won by the last drafts; what they lost counts against it
        self.rest = self.next_rest = 0
        self.proposed = self.accepted = 0
        self.extend(tokens)

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return len(self.tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            place = len(self.tokens)
            for size in SIZES:
                if place >= size:
                    self.places[tuple(self.tokens[-size:])] = place
            self.tokens.append(token)

    def propose(self, room: int) -> list[int]:
        """Return up to `room` tokens that may follow the text; none where it has no example, or drafts rest."""
        if self.rest:
            self.rest -= 1
            return []
        for size in SIZES:
            place = self.places.get(tuple(self.tokens[-size:]))
            if place is not None:
                return self.tokens[place : place + max(0, min(self.size, room))]
        return []

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many tokens of a draft came true."""
        if proposed == 0:
            return
        self.proposed += proposed
        self.accepted += accepted
        whole = accepted == proposed
        self.size = min(MOST, 2 * self.size) if whole else max(2, min(self.size, accepted + 1))
        self.balance = min(LOSS, self.balance + accepted - COST * proposed)
        if self.balance < -LOSS:
            self.next_rest = min(LONGEST_REST, 2 * self.next_rest or REST)
            self.rest, self.balance = self.next_rest, 0.0
        elif whole:
            self.next_rest = 0
