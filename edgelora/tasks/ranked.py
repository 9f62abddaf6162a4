"""Rankings: what is asked for one, how good they are, and how people see them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import Row
from edgelora.tasks.rows import json_row, text_problems

ASKED = ("query", "items")
SHOWN = 10


def asked_rankings(inputs: Sequence[str], columns: Sequence[str] = ASKED) -> list[Row]:
    """Return the rows that INPUTs are: a query and the items to rank, or rows of these columns written as JSON."""
    rows = [json_row(text, columns) for text in inputs]
    found = [row for row in rows if row is not None]
    return found if len(found) == len(inputs) else [{"query": inputs[0], "items": list(inputs[1:])}]


def ranking_problems(row: Row) -> list[str]:
    """Return what is wrong with a query and the items to rank for it."""
    items = row.get("items")
    good = isinstance(items, list) and items and all(isinstance(item, str) and item.strip() for item in items)
    return text_problems(row, ("query",)) + ([] if good else ['"items" must be a list of texts, none of them empty'])


def ranks(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the place, from 1, of the best relevant item of each query; scores, relevant [Q, I]. Ties count against it."""
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    return np.asarray(1 + ((scores >= best) & ~relevant).sum(axis=1))


def retrieval_scores(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> dict[str, float]:
    """Return MRR, the mean of 1 / place of the best relevant item, and the share of queries that have one in the first k."""
    places = ranks(scores, relevant)
    return {"mrr": float((1 / places).mean()), **{f"recall@{k}": float((places <= k).mean()) for k in (1, 5, 10)}}


def candidate_scores(queries: Sequence[str], scores: NDArray[Any], relevance: NDArray[Any]) -> dict[str, float]:
    """Return what scores [N] of (query, candidate) pairs are worth against their relevances [N]: nDCG@10, MRR, and the share
    of a query's relevant items (those above 0) among its first k; means over the queries that have a relevant one.

    Ties count against the item. Where no query has a relevant item all are 0.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, query in enumerate(queries):
        members[query].append(index)
    found: dict[str, list[float]] = {name: [] for name in ("ndcg@10", "mrr", "recall@1", "recall@5", "recall@10")}
    for group in members.values():
        # The worst first: a stable sort by score then puts the irrelevant first where scores are equal.
        order = sorted(group, key=lambda index: relevance[index])
        own, gains = scores[order], relevance[order]
        if not gains.any():
            continue
        places = np.flatnonzero(gains[np.argsort(-own, kind="stable")] > 0) + 1
        found["ndcg@10"].append(ndcg(own, gains))
        found["mrr"].append(1 / int(places[0]))
        for k in (1, 5, 10):
            found[f"recall@{k}"].append(float((places <= k).mean()))
    return {name: float(np.mean(values)) if values else 0.0 for name, values in found.items()}


def ndcg(scores: NDArray[Any], relevance: NDArray[Any], k: int = 10) -> float:
    """Return the normalized discounted cumulative gain of the first k items of one query, gains being the relevances (Järvelin
    and Kekäläinen, 10.1145/582415.582418); 0 where nothing is relevant."""
    discounts = 1 / np.log2(np.arange(2, 2 + min(k, len(scores))))
    order = np.argsort(-scores, kind="stable")[:k]
    ideal = float((np.sort(relevance)[::-1][:k] * discounts).sum())
    return float((relevance[order] * discounts).sum()) / ideal if ideal else 0.0


def ranking(items: Sequence[str], scores: Sequence[float]) -> list[dict[str, Any]]:
    """Return [{"item", "score"}], the best first."""
    order = sorted(range(len(items)), key=lambda index: -scores[index])
    return [{"item": items[index], "score": float(scores[index])} for index in order]


def ranking_text(answer: Sequence[dict[str, Any]]) -> str:
    """Return the best items, one on a line."""
    return "\n".join(f"{entry['score']:7.3f}  {entry['item']}" for entry in answer[:SHOWN])
