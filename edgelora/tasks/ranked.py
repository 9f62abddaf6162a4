"""Rankings: how good they are, and how people see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHOWN = 10


def ranks(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the place, from 1, of the best relevant item of each query; scores, relevant [Q, I]. Ties count against it."""
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    return np.asarray(1 + ((scores >= best) & ~relevant).sum(axis=1))


def retrieval_scores(scores: NDArray[Any], relevant: NDArray[np.bool_]) -> dict[str, float]:
    """Return MRR, the mean of 1 / place of the best relevant item, and the share of queries that have one in the first k."""
    places = ranks(scores, relevant)
    return {"mrr": float((1 / places).mean()), **{f"recall@{k}": float((places <= k).mean()) for k in (1, 5, 10)}}


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
