"""EVA (Explained Variance Adaptation, arXiv 2410.07170, section 3): A begins with the directions in which a layer's inputs vary
most on the user's own rows, B with zero.

    X - mean(X) = U S Vᵀ        A = V_rᵀ

X `[T, K]` are a layer's inputs over all tokens. They never exist at once: the decomposition takes them batch by batch
(Ross et al., Incremental Learning for Robust Visual Tracking, 2008, section 2.2, as PEFT does). Ranks are not redistributed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgelora.adapters.inject import adapters
from edgelora.errors import DataError

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network

    Batch = dict[str, Tensor]

AT_ONCE = 64  # tokens that are decomposed together: the time goes with the square of it
SIMILAR = 0.99  # cosine of a direction with what it was a batch before: it has converged (PEFT's tau)


class Directions:
    """The principal directions of the rows seen so far, at most `count` of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.num_rows = 0
        self.mean_K = torch.zeros(0)
        self.scaled_MK = torch.zeros(0)  # S Vᵀ, the largest first
        self._marked_MK = self.scaled_MK

    def add(self, x_TK: Tensor) -> None:
        """Take in more rows. What they are centred by changes with them, which one more row makes up for."""
        x_TK = x_TK.double()
        mean_K, rows = x_TK.mean(0), x_TK.shape[0]
        before = self.scaled_MK
        if self.num_rows:
            total = self.num_rows + rows
            correction = math.sqrt(self.num_rows * rows / total) * (self.mean_K - mean_K)
            stacked = torch.cat([before, x_TK - mean_K, correction.unsqueeze(0)])
            self.mean_K = self.mean_K + (mean_K - self.mean_K) * (rows / total)
        else:
            stacked, self.mean_K = x_TK - mean_K, mean_K
        # Eigenvectors of the smaller side: few rows, many columns.
        vectors = torch.linalg.eigh(stacked @ stacked.t())[1].flip(1)[:, : self.count]
        self.scaled_MK = vectors.t() @ stacked
        self.num_rows += rows

    def converged(self) -> int:
        """Return how many of the leading directions are as they were when this was asked before."""
        before, now = self._marked_MK, self.scaled_MK
        both = min(len(before), len(now))
        self._marked_MK = now
        if not both:
            return 0
        alike = F.cosine_similarity(before[:both], now[:both]).abs() >= SIMILAR
        return both if bool(alike.all()) else int(alike.int().argmin())

    def leading(self, rank: int) -> Tensor:
        """Return `[rank, K]` fp32, each of length 1."""
        return F.normalize(self.scaled_MK[:rank]).float()


class Listener:
    """Takes in what adapters are given. Layers on one and the same input (queries, keys, values) share their directions."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.mask: Tensor | None = None  # [rows, tokens], zero where a row is padded
        self.leaders: dict[str, str] = {}
        self.directions: dict[str, Directions] = {}
        self._last: tuple[str, Tensor] | None = None

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        x, path = inputs[0], layer.path
        if path not in self.leaders:
            # The last tensor is held here, so that no other can be at its address.
            shared = self._last is not None and self._last[1].data_ptr() == x.data_ptr() and self._last[1].shape == x.shape
            self.leaders[path] = self._last[0] if shared and self._last else path
        leader = self.leaders[path]
        self._last = leader, x
        if leader == path:
            found = self.directions.setdefault(path, Directions(self.count))
            padded = self.mask is not None and x.ndim == 3 and self.mask.shape == x.shape[:2]
            rows_TK = x[self.mask.bool()] if padded and self.mask is not None else x.reshape(-1, x.shape[-1])
            for part_TK in torch.split(rows_TK, AT_ONCE):
                found.add(part_TK)


@torch.no_grad()
def eva(model: Decoder | Network, batches: Iterable[Batch], compute: Callable[[Batch], object]) -> int:
    """Put the directions of the layers' inputs into all adapters' A, whose B are zero; return the number of batches it took.

    `compute` runs the model on a batch. Raises DataError if the batches are too few for the rank.
    """
    found = adapters(model)
    ranks = {path: adapter.lora_A.shape[0] for path, adapter in found.items()}
    listener = Listener(2 * max(ranks.values()))
    handles = [adapter.register_forward_pre_hook(listener) for adapter in found.values()]
    training, count = model.training, 0
    model.eval()
    try:
        for batch in batches:
            count += 1
            listener.mask = batch.get("attention_mask")
            compute(batch)
            converged = {leader: directions.converged() for leader, directions in listener.directions.items()}
            if all(converged[leader] >= ranks[path] for path, leader in listener.leaders.items()):
                break
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for path, adapter in found.items():
        seen = listener.directions[listener.leaders[path]] if path in listener.leaders else Directions(0)
        if seen.num_rows <= ranks[path]:
            raise DataError(
                f"EVA needs more tokens than the rank: {path} has rank {ranks[path]} and was given {seen.num_rows}",
                hint='give more rows, or init = "kaiming"',
            )
        adapter.lora_A.copy_(seen.leading(ranks[path]))
    return count
