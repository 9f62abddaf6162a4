"""A torch model as the tasks score it: batches that bound the memory, and no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.encoder import Encoder
    from edgelora.tasks.base import Example

Collate = Callable[[Sequence["Example"]], dict[str, NDArray[Any]]]

BATCH_TOKENS = 512  # tokens computed at once, padding counted
GENERATED_AT_ONCE = 16  # prompts that share a cache


def to_tensors(batch: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


class TorchPredictor:
    """The Predictor (tasks/base.py) of a Decoder or an Encoder. `collate` is the task's, its padding token filled in."""

    def __init__(self, model: Decoder | Encoder, collate: Collate, *, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model: Any = model
        self.collate = collate
        self.batch_tokens = batch_tokens

    @torch.no_grad()
    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """Return the summed negative log-likelihood and the number of supervised tokens of each example."""
        self.model.eval()
        found: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
        for numbers in self._batches(examples):
            batch = to_tensors(self.collate([examples[i] for i in numbers]))
            hidden_TH = self.hidden(numbers, batch)
            # The targets of one document after the other, each cut where the next document's first position comes.
            cuts = torch.searchsorted(batch["positions"], batch["starts"]).tolist()
            for number, start, stop in zip(numbers, cuts, cuts[1:], strict=False):
                states_SH, targets = hidden_TH[batch["positions"][start:stop]], batch["targets"][start:stop]
                found[number] = (float(self.model.nll(states_SH, targets)), len(targets))
        return found

    def hidden(self, numbers: list[int], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the last hidden states `[T, H]` of a batch of the examples `numbers`."""
        states: torch.Tensor = self.model.hidden(batch["ids"], batch["starts"])
        return states

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]) -> list[list[int]]:
        """Continue each prompt greedily; prompts of like length share a cache."""
        self.model.eval()
        answers: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), GENERATED_AT_ONCE):
            numbers = order[start : start + GENERATED_AT_ONCE]
            for number, answer in zip(
                numbers, self.model.generate([list(prompts[i]) for i in numbers], max_new_tokens, stop), strict=True
            ):
                answers[number] = answer
        return answers

    @torch.no_grad()
    def logits(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        """Return the logits `[examples, labels]`."""
        self.model.eval()
        rows: dict[int, NDArray[np.float32]] = {}
        for numbers in self._batches(examples):
            batch = to_tensors(self.collate([examples[i] for i in numbers]))
            batch.pop("labels")
            logits_BL = self.model.logits(**batch).float().numpy()
            rows.update(zip(numbers, logits_BL, strict=True))
        return np.stack([rows[i] for i in range(len(examples))])

    def _batches(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        """Yield the numbers of examples of like length, longest first, at most `batch_tokens` (or one example) at once."""
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
        start = 0
        while start < len(order):
            size = max(1, self.batch_tokens // max(1, len(examples[order[start]])))
            yield order[start : start + size]
            start += size
