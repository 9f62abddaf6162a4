"""The KV cache of system turns, in memory, for a process that many prompts come to: a server."""

from __future__ import annotations

from edgelora.run.bound import Cache

LIMIT_BYTES = 64 << 20  # of all of them; the least recently used go first
LEAST_KEPT = 32  # tokens: a shorter turn is computed as soon as its copy is looked up


class Kept:
    """Tokens and their keys and values, the most recently used last."""

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self.limit = limit
        self.entries: list[tuple[list[int], Cache]] = []

    def find(self, ids: list[int]) -> tuple[int, Cache]:
        """Return the longest entry that `ids` begin with, as its length and its cache; (0, {}) where there is none."""
        found = [entry for entry in self.entries if ids[: len(entry[0])] == entry[0]]
        if not found:
            return 0, {}
        best = max(found, key=lambda entry: len(entry[0]))
        self.entries = [*(entry for entry in self.entries if entry is not best), best]
        return len(best[0]), best[1]

    def add(self, ids: list[int], cache: Cache) -> None:
        """Keep what a decoder saved after `ids`, and forget the least recently used where that is too much."""
        if size(cache) > self.limit:
            return
        self.entries.append((list(ids), cache))
        while sum(size(held) for _, held in self.entries) > self.limit:
            self.entries.pop(0)


def size(cache: Cache) -> int:
    return sum(array.nbytes for array in cache.values())
