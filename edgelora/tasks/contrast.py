"""What contrastive tasks share: pairs of a batch that fit although they are others, and which of all pairs fit."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import Example, Predictor

if TYPE_CHECKING:
    import torch

AT_ONCE = 256  # examples whose outputs are held
NEVER = float("-inf")


def mark(arrays: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return numbers [B] that tell arrays apart."""
    return np.array([zlib.crc32(array.tobytes()) for array in arrays], dtype=np.int64)


def fitting(batch: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """Tell for each pair of a batch, bool [B, B], whether it fits: one of its sides, marked under `names`, is the same."""
    found = [batch[name][:, None] == batch[name][None, :] for name in names]
    return found[0] | found[1]


def own_pairs_loss(scores_BB: torch.Tensor, fits_BB: torch.Tensor, *, both: bool) -> torch.Tensor:
    """Return the cross-entropy of each row's own column among those that do not fit it too, summed; both: the mean of it and of
    that of each column's own row."""
    import torch

    own = torch.arange(len(scores_BB))
    scores = scores_BB.masked_fill(fits_BB & (own[:, None] != own[None, :]), NEVER)
    ways = (scores, scores.T) if both else (scores,)
    return torch.stack([torch.nn.functional.cross_entropy(way, own, reduction="sum") for way in ways]).mean()


def outputs_of(predictor: Predictor, examples: Sequence[Example], name: str) -> list[NDArray[np.float64]]:
    """Return one output of each example, a part of them after the other: the others may be large."""
    parts = [predictor.outputs(examples[start : start + AT_ONCE]) for start in range(0, len(examples), AT_ONCE)]
    return [said[name].astype(np.float64) for part in parts for said in part]


def relevance(queries: Sequence[Any], items: Sequence[Any]) -> tuple[list[int], list[int], NDArray[np.bool_]]:
    """Return the places of the distinct queries and of the distinct items where each comes first, and which of them stand in
    one row, bool [Q, I]."""
    rows, columns = ({key: number for number, key in enumerate(dict.fromkeys(keys))} for keys in (queries, items))
    fits = np.zeros((len(rows), len(columns)), dtype=bool)
    for query, item in zip(queries, items, strict=True):
        fits[rows[query], columns[item]] = True
    first = [{key: number for number, key in reversed(list(enumerate(keys)))} for keys in (queries, items)]
    return [first[0][key] for key in rows], [first[1][key] for key in columns], fits
