"""How much a model says what another one says: top-1 agreement, and the mean KL divergence in nats per position.

With p the reference's probabilities and q the other's, of logits z and normalizers log Z = log Σ exp z,

    KL(p ‖ q) = Σ_v p_v (log p_v - log q_v) = Σ_v p_v (z^p_v - z^q_v) - log Z^p + log Z^q

which one pass over the vocabulary in tiles gives, with online sums as in models/head.py: no `[tokens, vocabulary]` tensor. A
decoder's positions are the supervised ones, from each example's first on, as many as `MOST_BYTES` of hidden states hold; a
classifier's are the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelora.errors import FolderError
from edgelora.models.head import TILE_ROWS, Head
from edgelora.models.predictor import TorchPredictor

if TYPE_CHECKING:
    from edgelora.run.predictor import OnnxPredictor
    from edgelora.tasks.base import Example, Task

MOST_BYTES = 8 << 20  # of the reference's hidden states, all examples together
AT_ONCE = 512  # positions, with TILE_ROWS logits each

Tiles = Iterable[Tensor]  # logits `[S, n]` of one part of the vocabulary after the other


@dataclass
class Agreement:
    """Sums over positions: how many have the same likeliest token, and the KL divergence in nats."""

    positions: int = 0
    same: int = 0
    divergence: float = 0.0

    def add(self, reference: Tiles, other: Tiles) -> None:
        positions, same, divergence = compare(reference, other)
        self.positions += positions
        self.same += same
        self.divergence += divergence

    def figures(self) -> dict[str, float]:
        """Return {"agreement": share of positions, "kl": nats per position}."""
        count = max(1, self.positions)
        return {"agreement": self.same / count, "kl": max(0.0, self.divergence / count)}


@dataclass(frozen=True)
class Reference:
    """What the model to compare with says of each example: hidden states `[S, H]` before `head`, or a classifier's logits
    `[1, L]` (head None)."""

    said: list[Tensor]
    head: Head | None

    def tiles(self, number: int, start: int, stop: int) -> Tiles:
        """Return the logits of positions of one example."""
        return tiles(self.said[number][start:stop], self.head)

    @torch.no_grad()
    def agreement(self, reference: Reference) -> Agreement:
        """Compare what another model says of the same examples with the reference."""
        theirs, ours = torch.cat(reference.said), torch.cat(self.said)
        found = Agreement()
        for start in range(0, len(ours), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            found.add(tiles(theirs[part], reference.head), tiles(ours[part], self.head))
        return found

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        counts = torch.tensor([len(part) for part in self.said])
        save_file({"said": torch.cat(self.said), "counts": counts}, path)

    @classmethod
    def load(cls, path: Path, head: Head | None) -> Reference:
        """Read what `save` wrote. Raises FolderError where it is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            return cls(list(torch.split(tensors["said"], tensors["counts"].tolist())), head)
        except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
            raise FolderError(f"{path} is damaged: {error}", hint="train the run again") from None


class Watched:
    """A torch predictor that keeps what it says of the examples that it scores."""

    def __init__(self, predictor: TorchPredictor, task: Task) -> None:
        self.predictor, self.task = predictor, task
        self.generate, self.write = predictor.generate, predictor.write
        self.head: Head | None = getattr(predictor.model, "head", None)
        self.said: dict[int, Tensor] = {}

    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        def watch(number: int, states_SH: Tensor) -> None:
            most = MOST_BYTES // (4 * states_SH.shape[1] * len(examples))
            self.said[number] = states_SH[: max(1, most)].clone()

        self.predictor.watch = watch
        try:
            return self.predictor.losses(examples)
        finally:
            self.predictor.watch = None

    def outputs(self, examples: Sequence[Example]) -> list[dict[str, NDArray[np.float32]]]:
        found = self.predictor.outputs(examples)
        for outputs, example in zip(found, examples, strict=True):
            self.said[len(self.said)] = torch.from_numpy(self.task.compared(outputs, example))
        self.head = None
        return found

    def logits(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        found = self.predictor.logits(examples)
        self.said = dict(enumerate(torch.split(torch.from_numpy(found), 1)))
        self.head = None
        return found

    def reference(self) -> Reference:
        """Return what others will be compared with; call it after `losses` or `logits`."""
        return Reference([self.said[number] for number in range(len(self.said))], self.head)


class WatchedBundle:
    """A bundle's predictor that compares its logits with the reference as they come: they are too many to be kept."""

    def __init__(self, predictor: OnnxPredictor, reference: Reference, task: Task) -> None:
        self.predictor, self.reference, self.task = predictor, reference, task
        self.generate, self.write = predictor.generate, predictor.write
        self.found = Agreement()
        self.seen = 0  # examples whose outputs were compared

    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        seen = [0] * len(examples)

        @torch.no_grad()
        def watch(number: int, logits: NDArray[np.float32]) -> None:
            start = seen[number]
            seen[number] += len(logits)
            stop = min(seen[number], len(self.reference.said[number]))
            if start < stop:
                ours = torch.from_numpy(logits[: stop - start])
                self.found.add(self.reference.tiles(number, start, stop), torch.split(ours, TILE_ROWS, 1))

        self.predictor.watch = watch
        try:
            return self.predictor.losses(examples)
        finally:
            self.predictor.watch = None

    def outputs(self, examples: Sequence[Example]) -> list[dict[str, NDArray[np.float32]]]:
        found = self.predictor.outputs(examples)
        known = self.reference.said[self.seen : self.seen + len(examples)]
        for said, outputs, example in zip(known, found, examples, strict=True):
            self.found.add([said], [torch.from_numpy(self.task.compared(outputs, example))])
        self.seen += len(examples)
        return found

    def logits(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        found = self.predictor.logits(examples)
        self.found.add([torch.cat(self.reference.said)], [torch.from_numpy(found)])
        return found


def tiles(said: Tensor, head: Head | None) -> Iterator[Tensor]:
    """Yield logits `[S, n]` of hidden states `[S, H]`, or of no head the logits themselves."""
    if head is None:
        yield said
    else:
        yield from head.tiles(said)


def compare(reference: Tiles, other: Tiles) -> tuple[int, int, float]:
    """Return positions, those with the same argmax, and the summed KL(reference ‖ other) of logits in equal tiles."""
    ours, theirs, weighted, positions = _Online(), _Online(), torch.zeros(0), 0
    for z_p, z_q in zip(reference, other, strict=True):
        positions = len(z_p)
        weights, shrink = ours.add(z_p)
        weighted = shrink * weighted if len(weighted) else torch.zeros(positions, dtype=torch.float64)
        weighted = weighted + (weights * (z_p - z_q)).sum(-1, dtype=torch.float64)
        theirs.add(z_q)
    divergence = weighted / ours.total - ours.normalizer + theirs.normalizer
    return positions, int((ours.choice == theirs.choice).sum()), float(divergence.sum())


class _Online:
    """Maximum, its index and the log of Σ exp z of logits that come in tiles; each is `[S]`."""

    def __init__(self) -> None:
        self.maximum, self.total, self.choice, self.width = torch.zeros(0), torch.zeros(0), torch.zeros(0), 0

    def add(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return exp(z - maximum so far) `[S, n]`, and the factor `[S]` that earlier sums shrink by."""
        value, index = z.max(-1)
        if not self.width:
            self.maximum = value.new_full(value.shape, float("-inf"))
            self.total, self.choice = torch.zeros(len(value), dtype=torch.float64), index
        higher = torch.maximum(self.maximum, value)
        shrink = torch.exp(self.maximum - higher).double()
        self.choice = torch.where(value > self.maximum, index + self.width, self.choice)
        weights = torch.exp(z - higher.unsqueeze(-1))
        self.total = self.total * shrink + weights.sum(-1, dtype=torch.float64)
        self.maximum, self.width = higher, self.width + z.shape[1]
        return weights, shrink

    @property
    def normalizer(self) -> Tensor:
        return self.total.log() + self.maximum
