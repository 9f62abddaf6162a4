"""The validation split: decided by what a row holds, so that it is the same on every machine and in every order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence

from edgelora.errors import SettingsError
from edgelora.tasks.base import Row

DEFAULT_SHARE, DEFAULT_LIMIT = 0.1, 500


def row_hash(row: Row) -> int:
    """Return 64 bits that identical rows share."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=True, default=repr)
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "big")


def parse_share(valid: str | None) -> float | None:
    """Return the share that --valid names, None when it names a file (or is not given)."""
    try:
        share = float(valid) if valid is not None else None
    except ValueError:
        return None
    if share is not None and not 0 < share < 1:
        raise SettingsError(f"--valid is {valid}; allowed: a file, or a share between 0 and 1", hint="--valid 0.1")
    return share


def choose_valid(hashes: Sequence[int], labels: Sequence[str | None], share: float | None = None) -> set[int]:
    """Return the hashes of the validation rows: `share` of the rows (or a tenth, at most 500), at least one.

    Identical rows go to one side together. Within a label the rows rank by hash, and those of all labels are taken by their
    rank's quantile: each label gives its share, and a label with a single row keeps it in training. Empty when all rows are
    identical.
    """
    counts = Counter(hashes)
    label_of = dict(zip(hashes, labels, strict=True))
    by_label: dict[str | None, list[int]] = defaultdict(list)
    for value in sorted(counts):
        by_label[label_of[value]].append(value)
    ranked = sorted(
        ((rank + 0.5) / len(values), value)
        for label, values in by_label.items()
        for rank, value in enumerate(values)
        if label is None or len(values) > 1
    )
    wanted = min(round(len(hashes) * DEFAULT_SHARE), DEFAULT_LIMIT) if share is None else round(len(hashes) * share)
    chosen: set[int] = set()
    taken = 0
    for _, value in ranked[: len(counts) - 1]:
        if chosen and taken + counts[value] > max(wanted, 1):
            break
        chosen.add(value)
        taken += counts[value]
    return chosen
